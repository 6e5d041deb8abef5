"""Messages to text: run a chat template and know, for each character, whose it is.

Two tricks with private-use characters, which no template writes:

  escape   A control token's string inside a message ("<|im_end|>" typed by a user) is replaced by one private character
           before rendering. What the template itself writes is then the only place where control tokens stand.
  mark     Each message's content is wrapped in a pair of private characters, so that the rendered text shows where it
           went. Without the marks the text must equal the unmarked rendering; where a template looks into the content
           and it does not, contents are searched for instead.
"""

import bisect
import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tutelage.errors import TemplateError

_MARKS = 0xF0000  # plane 15: a pair of marks for each content field
_ESCAPES = 0x100000  # plane 16: one character for each escaped string
_MARK = re.compile("[\U000f0000-\U000fffff]")
_PRIVATE = re.compile("[\U000f0000-\U000fffff\U00100000-\U0010ffff]")
_ROLE = re.compile(r"[A-Za-z][\w\-]*\Z")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
TRAIN_FLAGS = ("trainable", "loss", "weight")
_MARKED_FIELDS = ("reasoning_content", "content")


@dataclass(frozen=True)
class Region:
    """Characters [start, stop) of a rendered text that come from one field of one message."""

    start: int
    stop: int
    message: int
    name: str
    """"content" or "reasoning_content"."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation in escaped form: each escaped string is one character."""

    text: str
    regions: tuple[Region, ...]
    """Where the contents of messages are, in order, without overlap."""
    escapes: Mapping[str, str]
    """Private character -> the string it stands for."""
    controls: tuple[tuple[int, int], ...]
    """Control tokens that the template wrote: [start, stop) in `text`."""
    is_whole: bool
    """True where every control token in the text was written by the template: it may be tokenised in one go."""
    generated: tuple[tuple[int, int], ...] | None = None
    """[start, stop) of what stands inside `{% generation %}`; None where the template has no such markers."""

    def plain(self, start: int = 0, stop: int | None = None) -> str:
        """The text as the model's user would read it."""
        part = self.text[start:stop]
        return "".join(self.escapes.get(c, c) for c in part) if self.escapes else part


def clean_text(text: str) -> str:
    """Text that can be encoded as UTF-8: surrogate pairs are joined, lone surrogates become U+FFFD."""
    if _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string (keys too) passed through `function`."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {function(str(k)): map_strings(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(v, function) for v in value]
    return value


@dataclass(frozen=True)
class MessageForm:
    """The form in which a template wants its messages; what `probe` finds out."""

    arguments: str = "text"
    """"text" (the raw JSON string), "object" (parsed), or "none" (tool calls are not shown)."""
    empty_content: str = "missing"
    """Where a message has no content: "missing" leaves the key out, "empty" writes ""."""
    content: str = "string"
    """"string", or "parts" for templates that read a list of `{"type": "text", "text": ...}`."""


@dataclass
class TemplateRenderer:
    """Runs one chat template, with the sandbox and the helper functions that transformers gives it."""

    template: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token` and so on, which templates may name."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the template, e.g. `enable_thinking`."""
    date: datetime.date | None = None
    """What a template that asks for today's date is told. None tells it the truth, which changes every day."""
    form: MessageForm = field(default_factory=MessageForm)

    def __post_init__(self) -> None:
        self.has_generation_markers = (
            re.search(r"\{%-?\s*generation\s*-?%\}", _COMMENT.sub("", self.template)) is not None
        )
        self._source = self.template
        formats = dict.fromkeys(m[2] for m in re.finditer(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", self.template))
        if formats and self.date is not None:
            # A macro shadows the global function of the same name.
            cases = "".join(
                "{%- " + ("elif" if i else "if") + f" format == {json.dumps(f)} -%}}{self.date.strftime(f)}"
                for i, f in enumerate(formats)
            )
            self._source = (
                "{%- macro strftime_now(format) -%}" + cases + "{%- endif -%}{%- endmacro -%}" + self.template
            )

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        """The text of messages that are already in the template's form; `prompt` adds the header of the next answer."""
        return self._run(messages, tools, prompt=prompt, generated=False)[0]

    def render_generated(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text, and where the template says that the assistant wrote."""
        text, spans = self._run(messages, tools, prompt=False, generated=True)
        return text, tuple((start, stop) for start, stop in spans)

    def _run(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, prompt: bool, generated: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # Typed loosely: what is returned has changed between versions of transformers.
            texts, spans = cast(
                Any,
                render_jinja_template(
                    conversations=[list(messages)],
                    tools=list(tools) or None,
                    chat_template=self._source,
                    return_assistant_tokens_mask=generated,
                    add_generation_prompt=prompt,
                    **{**self.special_tokens, **self.kwargs},
                ),
            )
        except Exception as error:  # whatever a template raises: its own message, a type, a missing key
            roles = " ".join(str(m.get("role")) for m in messages)
            raise TemplateError(
                f"the chat template could not render a conversation of roles [{roles}]: "
                f"{type(error).__name__}: {error}. Change the messages to what the template takes "
                "(see ChatText.report), or pass template= with one that takes these."
            ) from error
        return str(texts[0]), list(spans[0]) if generated else []

    def prepare(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages in the form the template wants.

        Raises:
            TemplateError: a role is not a plain word, content is not text, or tool arguments are not JSON where the
                template needs them parsed.
        """
        return [self._prepared(i, m) for i, m in enumerate(messages)]

    def _prepared(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.match(role):
            raise TemplateError(
                f"message {index} needs a role that is a plain word (system, user, assistant, tool), got {role!r}. "
                "Templates print it between control tokens."
            )
        out: dict[str, Any] = {
            k: map_strings(v, clean_text) for k, v in message.items() if v is not None and k not in TRAIN_FLAGS
        }
        content = out.get("content")
        if isinstance(content, list):
            content = self._joined_parts(index, content)
        elif content is not None and not isinstance(content, str):
            raise TemplateError(
                f"message {index} ({role}) needs text as its content, got {type(content).__name__}. "
                "Turn it into a string first (json.dumps for data)."
            )
        if content is None and self.form.empty_content == "empty":
            content = ""
        if content is None:
            out.pop("content", None)
        else:
            out["content"] = content if self.form.content == "string" else [{"type": "text", "text": content}]
        reasoning = next((out.pop(k) for k in REASONING_FIELDS if isinstance(out.get(k), str)), None)
        for name in REASONING_FIELDS:
            out.pop(name, None)
        if reasoning is not None:
            out["reasoning_content"] = reasoning
        if out.get("tool_calls"):
            out["tool_calls"] = [self._call(index, c) for c in out["tool_calls"]]
        else:
            out.pop("tool_calls", None)
        return out

    def _joined_parts(self, index: int, parts: list[Any]) -> str:
        texts = []
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise TemplateError(
                    f"message {index} has a content part of type {kind!r}; only text can be trained on. "
                    "Leave the record out, or replace the part by text."
                )
        return "".join(texts)

    def _call(self, index: int, call: Any) -> dict[str, Any]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TemplateError(
                f"message {index} has a tool call without a function name: {str(call)[:80]!r}. "
                'It needs {"type": "function", "function": {"name": ..., "arguments": "<JSON>"}}.'
            )
        arguments: Any = function.get("arguments", "{}")
        if self.form.arguments == "object" and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise TemplateError(
                    f"message {index}: this chat template needs the arguments of a tool call as an object, and those "
                    f"of {function['name']!r} are not JSON ({error}): {arguments[:80]!r}. Put the call as the model "
                    "wrote it into the content instead."
                ) from error
        elif self.form.arguments != "object" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        outer = {k: v for k, v in call.items() if k not in ("function", "name", "arguments", "type")}
        return {**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


@dataclass(frozen=True)
class ControlPatterns:
    """Which strings are control tokens, and in whose text they are kept apart."""

    written: re.Pattern[str]
    """Control tokens as the tokenizer finds them in what a template wrote (with the blanks that some of them eat)."""
    untrusted: re.Pattern[str]
    """What is escaped in the text of users, tools and the system."""
    assistant: re.Pattern[str]
    """What is escaped in the assistant's text: not the tokens that templates let the assistant write (<think>)."""
    prefixes: frozenset[str]
    """Proper beginnings of control tokens."""
    suffixes: frozenset[str]
    """Proper ends of control tokens."""

    def could_compose(self, text: str) -> bool:
        """True where the text begins or ends with a part of a control token: its neighbours could complete it."""
        longest = min(len(text), max(map(len, self.prefixes), default=0))
        return any(text[:n] in self.suffixes or text[-n:] in self.prefixes for n in range(1, longest + 1))


class Escaper:
    """Replaces control strings in one conversation by private characters, and remembers which is which."""

    def __init__(self, patterns: ControlPatterns) -> None:
        self._patterns = patterns
        self._private: dict[str, str] = {}

    @property
    def table(self) -> dict[str, str]:
        return {v: k for k, v in self._private.items()}

    def _placeholder(self, match: re.Match[str]) -> str:
        return self._private.setdefault(match[0], chr(_ESCAPES + len(self._private)))

    def text(self, text: str, pattern: re.Pattern[str]) -> str:
        text = _PRIVATE.sub(self._placeholder, text)
        # Placeholders of private characters that were in the text are not matched again: no control token has one.
        return pattern.sub(self._placeholder, text)

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        out = []
        for m in messages:
            pattern = self._patterns.assistant if m["role"] == "assistant" else self._patterns.untrusted
            rest = {k: v for k, v in m.items() if k != "role"}
            out.append({"role": m["role"], **self._values(rest, pattern)})
        return out

    def tools(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self._values(t, self._patterns.untrusted) for t in tools]

    def _values(self, value: Mapping[str, Any], pattern: re.Pattern[str]) -> dict[str, Any]:
        out: dict[str, Any] = map_strings(value, lambda s: self.text(clean_text(s), pattern))
        return out


def _mark(text: str, index: int) -> str:
    """The text with its core (blanks at the ends left out, so that templates can trim) between two marks."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{chr(_MARKS + 2 * index)}{core}{chr(_MARKS + 2 * index + 1)}{text[start + len(core) :]}"


def marked(messages: Sequence[Mapping[str, Any]], roles: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Messages whose contents stand between marks, for the roles asked for."""
    out = []
    for i, message in enumerate(messages):
        copy = dict(message)
        if roles(message["role"]):
            for j, name in enumerate(_MARKED_FIELDS):
                value, index = copy.get(name), len(_MARKED_FIELDS) * i + j
                if isinstance(value, str):
                    copy[name] = _mark(value, index)
                elif isinstance(value, list) and value:
                    copy[name] = [{**value[0], "text": _mark(value[0]["text"], index)}]
        out.append(copy)
    return out


def unmarked(text: str) -> tuple[str, list[Region], list[int]]:
    """The text without marks, the regions between complete pairs, and where the marks stood."""
    opened: dict[int, int] = {}
    regions: list[Region] = []
    places: list[int] = []
    for match in _MARK.finditer(text):
        which, is_end = divmod(ord(match[0]) - _MARKS, 2)
        here = match.start() - len(places)
        places.append(match.start())
        if not is_end:
            opened[which] = here
        elif which in opened:
            message, name = divmod(which, len(_MARKED_FIELDS))
            regions.append(Region(opened.pop(which), here, message, _MARKED_FIELDS[name]))
    regions.sort(key=lambda r: (r.start, r.stop))
    return _MARK.sub("", text), _without_overlap(regions), places


def _without_overlap(regions: list[Region]) -> list[Region]:
    out: list[Region] = []
    for region in regions:
        if not out or region.start >= out[-1].stop:
            out.append(region)
    return out


def searched(text: str, messages: Sequence[Mapping[str, Any]]) -> list[Region]:
    """Regions found by looking for each message's content, in order: for templates that look into contents."""
    regions, at = [], 0
    for i, message in enumerate(messages):
        value = message.get("content")
        core = value.strip() if isinstance(value, str) else ""
        start = text.find(core, at) if core else -1
        if start >= 0:
            at = start + len(core)
            regions.append(Region(start, at, i, "content"))
    return regions


def render_marked(
    renderer: TemplateRenderer,
    patterns: ControlPatterns,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    prompt: bool = False,
    generated: bool = False,
) -> Rendered:
    """Render escaped messages (`Escaper.messages`) and find out where each content went and what the template wrote.

    `generated` also asks the template's `{% generation %}` markers, where it has them.
    """
    spans: tuple[tuple[int, int], ...] | None = None
    if generated and renderer.has_generation_markers:
        text, spans = renderer.render_generated(messages, tools)
    else:
        text = renderer.render(messages, tools, prompt=prompt)
    every = [m.span() for m in patterns.written.finditer(text)]
    for roles in (lambda role: True, lambda role: role != "assistant"):
        marks = renderer.render(marked(messages, roles), tools, prompt=prompt)
        bare, regions, places = unmarked(marks)
        if bare == text:
            # Marks stand between a content and its neighbours, so no control token is found across that border.
            found = [m.span() for m in patterns.written.finditer(marks)]
            controls = [(a - bisect.bisect(places, a), b - bisect.bisect(places, a)) for a, b in found]
            return Rendered(text, tuple(regions), {}, tuple(controls), controls == every, spans)
    return Rendered(text, tuple(searched(text, messages)), {}, tuple(every), True, spans)
