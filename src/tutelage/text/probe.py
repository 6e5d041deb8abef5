"""What a chat template does with a conversation: found out by rendering made-up words and looking for them.

Templates drop things without a word: tool calls, tool results, the reasoning of earlier turns. A model trained on what
is left learns something other than its data. `probe` says what would be lost before anything is trained.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.errors import TemplateError
from tutelage.text.render import REASONING_FIELDS, MessageForm, TemplateRenderer

_USER, _REPLY, _LATER, _SYSTEM = "qzuserqz", "qzreplyqz", "qzlaterqz", "qzsystemqz"
_THOUGHT, _RESULT = "qzthoughtqz", "qzresultqz"
_NAME, _KEY, _VALUE, _TOOL = "qznameqz", "qzkeyqz", "qzvalueqz", "qztoolqz"
_TOOLS = (
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": _TOOL,
            "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "text"}}},
        },
    },
)
_MARKUP = re.compile(r"</?\w+>")
_EMPTY_THINK = re.compile(r"\s*(?:<think>)?\s*</think>\s*")

KEPT, DROPPED, REFUSED = "kept", "dropped", "refused"


@dataclass(frozen=True, kw_only=True)
class TemplateReport:
    """What one chat template does. `sentences()` says it for a person."""

    form: MessageForm
    """How messages are handed to it."""
    system: str
    """A system message is "kept", "dropped" or "refused" (an error)."""
    default_system: str
    """Text that it adds where there is no system message; "" for none."""
    tool_definitions: str
    """Descriptions of the tools on offer: "kept", "dropped" or "refused"."""
    tool_calls: str
    """"kept", "refused", or "dropped: " and what is missing (name, argument key, argument value)."""
    tool_call_content: str
    """What the assistant says in the same turn as a tool call: "kept", "dropped" or "refused"."""
    parallel_tool_calls: str
    """A second tool call in the same turn: "kept", "dropped" or "refused"."""
    tool_results: str
    reasoning: str
    """`reasoning_content` of the newest turn."""
    inline_reasoning: str
    """Reasoning inside the content of the newest turn, between <think> and </think>."""
    earlier_reasoning: str
    """Reasoning of a turn once a user has answered it."""
    reasoning_before_tool: str
    """Reasoning of a turn that called a tool, once the tool has answered."""
    prompt_is_prefix: bool
    """The text of a prompt with the header of the answer begins the text of the prompt with its answer."""
    prefix_after_user: bool
    """What was rendered of a plain turn stays the same when a user message follows."""
    prefix_after_user_with_reasoning: bool
    prefix_after_tool: bool
    """What was rendered of a tool call (with reasoning, where kept) stays the same when its result follows."""
    has_generation_markers: bool
    stop: str
    """Control token that ends a turn; "" where the turn itself has none."""
    call_stop: str
    """Control token that ends a turn with a tool call; "" where it has none."""
    stop_in_next: Mapping[str, str]
    """Role of the next message -> the control token that begins it, where that is what ends the turn (GLM)."""
    header: str
    """What a prompt ends with: the header of the assistant's turn."""
    empty_reasoning: str
    """What the template writes in place of reasoning where a turn has none, e.g. "<think>\\n\\n</think>\\n\\n"."""
    spoken: frozenset[str]
    """Control tokens inside the assistant's turns (not the stop token): the assistant may write them."""
    none_content: str
    """A turn with tool calls and no content: "kept" (fine), "refused" (an error unless "" is given)."""
    asks_for_date: bool

    @property
    def stops(self) -> tuple[str, ...]:
        """Every control token that ends an assistant's turn."""
        found = dict.fromkeys((self.stop, self.call_stop, *self.stop_in_next.values()))
        return tuple(s for s in found if s)

    def sentences(self) -> list[str]:
        """What a person should know before training with this template, most serious first."""
        out = []
        for what, fate in (
            ("system messages", self.system),
            ("tool definitions", self.tool_definitions),
            ("tool calls", self.tool_calls),
            ("what the assistant says beside a tool call", self.tool_call_content),
            ("a second tool call in one turn", self.parallel_tool_calls),
            ("tool results", self.tool_results),
            ("the assistant's reasoning", self.reasoning),
            ("reasoning inside the content, up to </think>", self.inline_reasoning),
        ):
            if what.startswith(("what the", "a second")) and self.tool_calls != KEPT:
                continue
            if fate.startswith(DROPPED):
                detail = fate.removeprefix(DROPPED).removeprefix(": ")
                out.append(f"It silently drops {what}{f' ({detail})' if detail else ''}.")
            elif fate == REFUSED:
                out.append(f"It raises an error on {what}.")
        if self.reasoning == KEPT and self.earlier_reasoning != KEPT:
            out.append("It drops the reasoning of earlier turns once a user has answered.")
        if self.reasoning == KEPT and self.tool_results == KEPT and self.reasoning_before_tool == DROPPED:
            out.append("It drops the reasoning of a turn that called a tool once the tool has answered.")
        if not self.prefix_after_user:
            out.append("A turn is rendered differently once a user has answered: each turn becomes its own sample.")
        elif not self.prefix_after_user_with_reasoning:
            out.append("A turn with reasoning is rendered differently once a user has answered: it is its own sample.")
        if self.tool_calls == KEPT and self.tool_results == KEPT and not self.prefix_after_tool:
            out.append("A tool call is rendered differently once its result follows: it becomes its own sample.")
        if not self.prompt_is_prefix:
            out.append(
                "The header of a prompt is not how the answered turn begins: it asks for something it then drops."
            )
        if not self.stop:
            named = ", ".join(f"{v} before a {k} message" for k, v in self.stop_in_next.items())
            out.append(
                f"A turn has no stop token of its own; it ends with the next message's first token ({named})."
                if named
                else "A turn has no stop token; the tokenizer's end-of-sequence token is added."
            )
        if self.default_system:
            out.append(f"It adds its own system prompt where there is none: {self.default_system[:80]!r}.")
        if self.empty_reasoning:
            out.append(f"It writes {self.empty_reasoning!r} where a turn has no reasoning; that is never trained.")
        if self.asks_for_date:
            out.append("It asks for today's date; ChatText(date=...) fixes it, so that runs can be repeated.")
        return out

    def lossy(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[str]:
        """What of these messages would not reach the model, one sentence each; empty where nothing is lost.

        Reasoning of earlier turns is not counted: it is trained in a sample that ends with its own turn.
        """
        said = [m for m in messages if m.get("role") == "assistant"]
        calls = [m for m in said if m.get("tool_calls")]
        checks = (
            (self.system, "system messages", any(m.get("role") == "system" for m in messages)),
            (self.tool_definitions, "tool definitions", bool(tools)),
            (self.tool_calls, "tool calls", bool(calls)),
            (self.tool_call_content, "what is said beside a tool call", any(_text(m).strip() for m in calls)),
            (self.parallel_tool_calls, "a second tool call in one turn", any(len(m["tool_calls"]) > 1 for m in calls)),
            (self.tool_results, "tool results", any(m.get("role") == "tool" for m in messages)),
            (self.reasoning, "the assistant's reasoning", any(_has_reasoning(m) for m in said)),
            (self.inline_reasoning, "reasoning inside the content", any("</think>" in _text(m) for m in said)),
        )
        verb = {REFUSED: "does not take"}
        return [
            f"the chat template {verb.get(fate, 'silently drops')} {what}"
            + (f" ({fate.removeprefix('dropped: ')})" if fate.startswith("dropped: ") else "")
            for fate, what, is_there in checks
            if is_there and fate != KEPT
        ]


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return "".join(str(p.get("text", "") if isinstance(p, Mapping) else p or "") for p in parts)


def _has_reasoning(message: Mapping[str, Any]) -> bool:
    return any(isinstance(message.get(k), str) and message[k].strip() for k in REASONING_FIELDS)


def _user(text: str = _USER) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _said(text: str | None = _REPLY, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _calls(*values: str) -> list[dict[str, Any]]:
    return [
        {"id": f"call{i}", "type": "function", "function": {"name": _NAME, "arguments": f'{{"{_KEY}": "{v}"}}'}}
        for i, v in enumerate(values)
    ]


def _result() -> dict[str, Any]:
    return {"role": "tool", "content": _RESULT, "tool_call_id": "call0", "name": _NAME}


class _Probe:
    """One template under test: renders, or answers None where the template raises."""

    def __init__(self, renderer: TemplateRenderer, controls: re.Pattern[str]) -> None:
        self.renderer = renderer
        self.controls = controls

    def text(self, *messages: Mapping[str, Any], tools: Sequence[Any] = (), prompt: bool = False) -> str | None:
        try:
            return self.renderer.render(self.renderer.prepare(messages), tools, prompt=prompt)
        except TemplateError:
            return None

    def fate(self, word: str, *messages: Mapping[str, Any], tools: Sequence[Any] = ()) -> str:
        text = self.text(*messages, tools=tools)
        return REFUSED if text is None else KEPT if word in text else DROPPED

    def settle_form(self) -> MessageForm:
        """Find the form in which the template takes messages; later probes use it."""
        if self.fate(_USER, _user()) != KEPT:
            parts = dataclasses.replace(self.renderer.form, content="parts")
            string, self.renderer.form = self.renderer.form, parts
            if self.fate(_USER, _user()) != KEPT:
                self.renderer.form = string
        shown: dict[str, str] = {}
        for kind in ("text", "object"):
            self.renderer.form = dataclasses.replace(self.renderer.form, arguments=kind, empty_content="missing")
            text = self.text(_user(), _said(None, tool_calls=_calls(_VALUE)))
            text = text or self._with_empty_content(_user(), _said(None, tool_calls=_calls(_VALUE)))
            if text and _KEY in text and _VALUE in text:
                shown[kind] = text
        # The raw text is kept where the template writes it as it writes the object, or takes nothing else. One that
        # wants the object writes the text differently: quoted as a JSON string, or in braces of its own.
        arguments = "text" if shown.get("object", shown.get("text")) == shown.get("text") and shown else "object"
        arguments = arguments if shown else "none"
        self.renderer.form = dataclasses.replace(self.renderer.form, arguments=arguments, empty_content="missing")
        without = self.text(_user(), _said(None, tool_calls=_calls(_VALUE)))
        if without is None or "None" in without:
            self.renderer.form = dataclasses.replace(self.renderer.form, empty_content="empty")
        return self.renderer.form

    def _with_empty_content(self, *messages: Mapping[str, Any]) -> str | None:
        self.renderer.form = dataclasses.replace(self.renderer.form, empty_content="empty")
        return self.text(*messages)

    def tool_calls(self) -> str:
        text = self.text(_user(), _said(None, tool_calls=_calls(_VALUE)))
        if text is None:
            return REFUSED
        words = {"name": _NAME, "argument key": _KEY, "argument value": _VALUE}
        missing = [k for k, w in words.items() if w not in text]
        return f"{DROPPED}: {', '.join(missing)}" if missing else KEPT

    def default_system(self) -> str:
        alone, given = self.text(_user()), self.text({"role": "system", "content": _SYSTEM}, _user())
        if alone is None:
            return ""
        before = alone[: alone.find(_USER)]
        between = (given or "").rpartition(_SYSTEM)[2]
        between = between[: between.find(_USER)] if _USER in between else ""
        while between and not before.endswith(between):
            between = between[1:]
        added = self.controls.sub(" ", before.removesuffix(between))
        added = re.sub(r"^\s*(?:system|SYSTEM)\b|\b(?:user|USER)\b\s*$", "", added).strip()
        return added if len(re.findall(r"\w{2,}", added)) > 2 else ""

    def keeps_prefix(self, before: Sequence[Mapping[str, Any]], after: Mapping[str, Any], stop: str) -> bool:
        """What was rendered up to the stop token of the last turn stays when a message follows."""
        short, long = self.text(*before), self.text(*before, after)
        if short is None or long is None:
            return False
        end = short.rfind(stop) + len(stop) if stop and stop in short else len(short.rstrip())
        return long.startswith(short[:end])

    def common(self, a: str, b: str) -> int:
        """Length of the common beginning, not ending inside a control token of either."""
        return common_length(a, b, self.controls)

    def stop_after(self, message: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        """The control token that ends the assistant's turn, in a conversation that ends there."""
        word = _VALUE if message.get("tool_calls") else _REPLY
        text, longer = self.text(_user(), message), self.text(_user(), message, after)
        if text is None or word not in text:
            return ""
        tail = text.rpartition(word)[2]
        found = self._ends(tail)
        if longer is not None and word in longer:
            # What is there with and without a next message belongs to the turn; a final end-of-text token does not.
            next_tail = longer.rpartition(word)[2]
            shared = self._ends(tail[: self.common(tail, next_tail)])
            if shared:
                return shared[-1]
        return found[0] if found else ""

    def _ends(self, text: str) -> list[str]:
        """Control tokens that may end a turn: not those that close a tool call inside it."""
        found = [m[0].strip() for m in self.controls.finditer(text)]
        return [f for f in found if f == "</s>" or not (f.startswith("</") or re.search(r"tool.calls?", f))]

    def stop_next(self, message: Mapping[str, Any], after: Mapping[str, Any], word: str) -> str:
        last = _VALUE if message.get("tool_calls") else _REPLY
        text = self.text(_user(), message, after)
        if text is None or last not in text or word not in text:
            return ""
        found = self._ends(text.rpartition(last)[2].partition(word)[0])
        return found[0] if found else ""

    def header(self) -> str:
        text, without = self.text(_user(), prompt=True), self.text(_user())
        if text is None or without is None:
            return ""
        return text[self.common(text, without) :]

    def empty_reasoning(self) -> str:
        """What stands between the header and the answer of a turn without reasoning, if it frames no reasoning."""
        prompt, plain = self.text(_user(), prompt=True), self.text(_user(), _said())
        if prompt is None or plain is None or _REPLY not in plain:
            return ""
        lead = plain[self.common(prompt, plain) : plain.find(_REPLY)]
        thinking = self.text(_user(), _said(reasoning_content=_THOUGHT))
        if thinking and _THOUGHT in thinking and _REPLY in thinking:
            frame = thinking[self.common(prompt, thinking) : thinking.rfind(_REPLY)].replace(_THOUGHT, "")
            if lead.strip() and "".join(lead.split()) == "".join(frame.split()):
                return lead
        return lead if lead.strip() and _EMPTY_THINK.fullmatch(lead) else ""

    def spoken(self, stops: Sequence[str], call_end: str) -> frozenset[str]:
        """Control tokens that stand inside the assistant's turns and neither open a turn, end one, nor frame others."""
        result = self.text(_user(), _said(None, tool_calls=_calls(_VALUE)), _result()) or ""
        after_call = result.rpartition(_VALUE)[2]
        after_call = after_call[after_call.find(call_end) :] if call_end and call_end in after_call else ""
        system, user = self.text({"role": "system", "content": _SYSTEM}, _user()) or "", self.text(_user()) or ""
        header = self.header()
        framing = self._all(system) | self._all(user) | self._all(after_call) | set(stops)
        framing |= {t for t in self._all(header) if not _MARKUP.fullmatch(t)}
        inside = self._all(header)
        for message in (_said(reasoning_content=_THOUGHT), _said(None, tool_calls=_calls(_VALUE))):
            text = self.text(_user(), message) or ""
            inside |= self._all(text[self.common(text, user) :])
        inside |= {t for t in self._all(self.renderer.template) if t in ("<think>", "</think>")}
        return frozenset(inside - framing)

    def _all(self, text: str) -> set[str]:
        return {m[0].strip() for m in self.controls.finditer(text)}


def common_length(a: str, b: str, controls: re.Pattern[str]) -> int:
    """Length of the common beginning of two texts, not ending inside a control token of either."""
    n = min(len(a), len(b))
    n = next((i for i in range(n) if a[i] != b[i]), n)
    for text in (a, b):
        # Control tokens are short: one that reaches past n begins shortly before it.
        for match in controls.finditer(text, max(0, n - 64)):
            if match.start() >= n:
                break
            if match.end() > n:
                n = match.start()
                break
    return n


def probe(renderer: TemplateRenderer, controls: re.Pattern[str]) -> TemplateReport:
    """Find out what the renderer's template does. Sets `renderer.form` to the form it takes messages in.

    Args:
        controls: matches the control tokens of the tokenizer.

    Raises:
        TemplateError: the template cannot render a single user message, or leaves it out.
    """
    p = _Probe(renderer, controls)
    form = p.settle_form()
    if p.fate(_USER, _user()) != KEPT:
        renderer.render(renderer.prepare([_user()]))  # raises with the template's own words, if it has any
        raise TemplateError(
            "the chat template must show a user's message and leaves it out. Pass template= with one made for chat."
        )
    system = {"role": "system", "content": _SYSTEM}
    thinking, call = _said(reasoning_content=_THOUGHT), _said(None, tool_calls=_calls(_VALUE))
    thinking_call = {**call, "reasoning_content": _THOUGHT}
    stop, call_stop = p.stop_after(_said(), _user(_LATER)), p.stop_after(call, _result())
    next_stops: dict[str, str] = {}
    if not stop:
        next_stops["user"] = p.stop_next(_said(), _user(_LATER), _LATER)
        next_stops["tool"] = p.stop_next(call, _result(), _RESULT)
    next_stops = {k: v for k, v in next_stops.items() if v}
    prompt, answered = p.text(_user(), prompt=True), p.text(_user(), _said())
    stops = (stop, call_stop, *next_stops.values())
    return TemplateReport(
        form=form,
        system=p.fate(_SYSTEM, system, _user()),
        default_system=p.default_system(),
        tool_definitions=p.fate(_TOOL, _user(), tools=_TOOLS),
        tool_calls=p.tool_calls(),
        tool_call_content=p.fate(_REPLY, _user(), _said(tool_calls=_calls(_VALUE))),
        parallel_tool_calls=p.fate(_LATER, _user(), _said(None, tool_calls=_calls(_VALUE, _LATER))),
        tool_results=p.fate(_RESULT, _user(), call, _result()),
        reasoning=p.fate(_THOUGHT, _user(), thinking),
        inline_reasoning=p.fate(_THOUGHT, _user(), _said(f"<think>\n{_THOUGHT}\n</think>\n\n{_REPLY}")),
        earlier_reasoning=p.fate(_THOUGHT, _user(), thinking, _user(_LATER)),
        reasoning_before_tool=p.fate(_THOUGHT, _user(), thinking_call, _result()),
        prompt_is_prefix=bool(prompt and answered and answered.startswith(prompt)),
        prefix_after_user=p.keeps_prefix([_user(), _said()], _user(_LATER), stop),
        prefix_after_user_with_reasoning=p.keeps_prefix([_user(), thinking], _user(_LATER), stop),
        prefix_after_tool=p.keeps_prefix([_user(), thinking_call], _result(), call_stop),
        has_generation_markers=renderer.has_generation_markers,
        stop=stop,
        call_stop=call_stop,
        stop_in_next=next_stops,
        header=p.header(),
        empty_reasoning=p.empty_reasoning(),
        spoken=p.spoken(stops, call_stop or next_stops.get("tool", "")),
        none_content=REFUSED if form.empty_content == "empty" else KEPT,
        asks_for_date="strftime_now" in renderer.template,
    )
