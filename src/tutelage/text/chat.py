"""Chat messages to tokens, with who wrote each of them.

    chat = ChatText(tokenizer)
    prompts = chat.prompts(tasks)                                   # ids for a sampler
    spans = [*chat.render_prompt(task), completion.as_span("student", version, params)]
    samples = chat.render_conversation(messages)                    # demonstrations for SFT

Control tokens are ids only where the template writes them. In what users, tools and systems say they are plain text.
"""

import copy
import datetime
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tutelage.errors import TemplateError
from tutelage.text.encode import Encoder
from tutelage.text.probe import TemplateReport, probe
from tutelage.text.render import Escaper, Rendered, TemplateRenderer, render_marked
from tutelage.text.turns import Turn, find_turn, label_prompt, label_sample, lost_text, to_spans
from tutelage.text.vocabulary import EosPad, check_eos_pad, vocabulary_differences
from tutelage.types import Span, Task, content_hash

Message = Mapping[str, Any]
TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""What templates that ask for today's date are told, unless ChatText gets another: the date Llama's own use."""


@dataclass(frozen=True)
class Continuation:
    """What follows a conversation so far, or why it cannot be continued token by token."""

    spans: tuple[Span, ...] | None
    """New spans to append: template, environment and user tokens up to the next answer. None: start a new sample."""
    reason: str = ""
    """Why there are none: what the template renders differently."""


class ChatText:
    """A tokenizer with its chat template.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: a Jinja template (text, or a path to a file) in place of the tokenizer's own.
        template_kwargs: settings of the template, e.g. `{"enable_thinking": False}`.
        generation_config: the model's; its `eos_token_id` joins the stop tokens.
        date: what a template that asks for the date is told; None tells it today's, which changes every day.
        assistant_tokens: control tokens that demonstrations may contain as such, besides those that the template itself
            writes in the assistant's turns (LFM2's tool calls, for example).

    Raises:
        TemplateError: there is no template, it cannot be rendered, or the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | Path | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        generation_config: Any = None,
        date: datetime.date | None = TEMPLATE_DATE,
        assistant_tokens: Iterable[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template = _template_text(tokenizer, template)
        self.template_kwargs = dict(template_kwargs or {})
        self._generation_config = generation_config
        self._encoder = Encoder(tokenizer, self.template)
        specials = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self._renderer = TemplateRenderer(self.template, specials, self.template_kwargs, date)
        self.report: TemplateReport = probe(self._renderer, self._encoder.written)
        """What the template does, found out by rendering made-up conversations."""
        self._patterns = self._encoder.patterns({*self.report.spoken, *assistant_tokens})

    @classmethod
    def from_pretrained(cls, path: str | Path, *, gguf_file: str | None = None, **kwargs: Any) -> "ChatText":
        """The tokenizer, template and generation config of a model folder or a name on the Hub."""
        from transformers import AutoTokenizer, GenerationConfig

        extra = {"gguf_file": gguf_file} if gguf_file else {}
        tokenizer = AutoTokenizer.from_pretrained(str(path), **extra)
        if kwargs.get("generation_config") is None and gguf_file is None:
            try:
                kwargs["generation_config"] = GenerationConfig.from_pretrained(str(path))
            except OSError:  # the folder has none
                kwargs["generation_config"] = None
        return cls(tokenizer, **kwargs)

    # --- prompts -------------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[int, ...]:
        """Ids of a prompt, the header of the answer included.

        Equal to the tokenizer's own `apply_chat_template` unless a message contains a control token's string.
        """
        return self._prompts([(messages, tools)])[0]

    def prompts(self, tasks: Sequence[Task]) -> list[tuple[int, ...]]:
        """`prompt_ids` of many tasks, tokenised together."""
        return self._prompts([(t.messages, t.tools) for t in tasks])

    def _prompts(self, chats: Sequence[tuple[Sequence[Message], Sequence[Mapping[str, Any]]]]) -> list[tuple[int, ...]]:
        texts: list[str] = []
        done: dict[int, tuple[int, ...]] = {}
        for i, (messages, tools) in enumerate(chats):
            prepared = self._prompt_messages(messages)
            if self._is_plain(prepared, tools):
                texts.append(self._renderer.render(prepared, tools, prompt=True))
            else:
                rendered = self._rendered_prompt(prepared, tools)
                done[i] = tuple(self._encoder.encode(rendered)[0].ids)
        batch = iter(self._encoder.batch(texts))
        return [done[i] if i in done else tuple(next(batch)) for i in range(len(chats))]

    def render_prompt(self, task: Task) -> list[Span]:
        """The prompt of a task as spans; their ids are `prompt_ids`.

        Text of system and user messages has the author "user", tool results "environment", and what the template adds
        (control tokens, its own system prompt, the header of the answer) "template".
        """
        rendered = self._rendered_prompt(self._prompt_messages(task.messages), task.tools)
        encoded, _ = self._encoder.encode(rendered)
        labels = label_prompt(rendered, [str(m["role"]) for m in task.messages])
        return to_spans(encoded, labels)

    def check_prompts(self, tasks: Iterable[Task]) -> list[str]:
        """What the template would not show of the prompts of these tasks, one sentence each, with how many it hits."""
        found = Counter(s for t in tasks for s in self.report.lossy(t.messages, t.tools))
        return [f"{sentence}, in {n} prompts" for sentence, n in found.most_common()]

    def _prompt_messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if not messages or messages[-1].get("role") == "assistant":
            raise TemplateError(
                "a prompt must end where the assistant is to speak, got "
                + ("no messages" if not messages else "an assistant message at its end")
                + ". Leave the answer out of the prompt, or use render_conversation for demonstrations."
            )
        return self._renderer.prepare(messages)

    def _rendered_prompt(self, prepared: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Rendered:
        escaper = Escaper(self._patterns)
        escaped, escaped_tools = escaper.messages(prepared), escaper.tools(tools)
        rendered = render_marked(self._renderer, self._patterns, escaped, escaped_tools, prompt=True)
        return replace(rendered, escapes=escaper.table)

    def _is_plain(self, prepared: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> bool:
        """True where no string of the messages holds, or could complete, a control token."""
        texts = list(_strings([{k: v for k, v in m.items() if k != "role"} for m in prepared])) + list(_strings(tools))
        search = self._patterns.untrusted.search
        return not any(search(t) or self._patterns.could_compose(t) for t in texts)

    # --- sampled turns -------------------------------------------------------------------------------------------

    def continue_with(
        self, spans: Sequence[Span], messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Continuation:
        """What comes between a sampled turn and the next one, so that the ids so far stay as they were sampled.

        Args:
            spans: the conversation so far, ending with the assistant's turn.
            messages: the whole conversation as messages: those of the spans, then the new ones (tool results, a user's
                next message). The new ones end where the assistant is to speak.

        Returns:
            The spans to append. Their `spans` is None where the template no longer renders the earlier conversation as
            it was sampled (dropped reasoning, trimmed blanks): start a new sample from `render_prompt`.
        """
        rendered = self._rendered_prompt(self._prompt_messages(messages), tools)
        so_far = self.decode([t for s in spans for t in s.token_ids])
        full = rendered.plain()
        if not full.startswith(so_far):
            at = next((i for i, (a, b) in enumerate(zip(full, so_far, strict=False)) if a != b), len(full))
            return Continuation(
                None,
                f"after {at} characters the template renders {full[at : at + 40]!r} where the tokens so far read "
                f"{so_far[at : at + 40]!r}",
            )
        start, length = 0, 0
        while length < len(so_far):
            length += len(rendered.escapes.get(rendered.text[start], " "))
            start += 1
        encoded, _ = self._encoder.encode(rendered, start)
        labels = label_prompt(rendered, [str(m["role"]) for m in messages])
        return Continuation(tuple(to_spans(encoded, labels)))

    # --- demonstrations ------------------------------------------------------------------------------------------

    def render_conversation(
        self,
        messages: Sequence[Message],
        *,
        author: str = "human",
        train: str = "all",
        tools: Sequence[Mapping[str, Any]] = (),
        max_tokens: int | None = None,
        overlong: str = "error",
        allow_lossy: bool = False,
    ) -> list[list[Span]]:
        """A demonstration as samples to train on: one, or more where the template's prefix breaks.

        Trained is what the assistant says: content, reasoning and tool calls as the template writes them, and the stop
        token. Never the header, an empty think block that the template adds, or what anyone else says. Each turn is
        trained in one sample only; in later ones it is context.

        Args:
            author: goes into the assistant's spans.
            train: "all" turns or the "last". A message's own `trainable`, `loss` or `weight` (0 or 1) goes first.
            max_tokens: longest sample, in tokens.
            overlong: what happens to a longer one: "error", "drop" (it is missing from the list), or "split" into
                samples of whole turns, each with the system message and as many of the latest messages as fit.
            allow_lossy: train on what is left where the template drops parts of the messages.

        Raises:
            TemplateError: nothing or everything would be trained, the template drops something, its `{% generation %}`
                markers leave out what the assistant said, or a sample is too long.
        """
        if overlong not in ("error", "drop", "split"):
            raise TemplateError(f'overlong must be "error", "drop" or "split", got {overlong!r}')
        losses = [] if allow_lossy else self.report.lossy(messages, tools)
        if losses:
            raise TemplateError(
                f"training on this conversation would lose parts of it: {'; '.join(losses)}. "
                "Use a template that shows them (template=), take them out of the data, or allow the loss "
                "(allow_lossy=True)."
            )
        flags = train_flags(messages, train)
        samples: list[list[Span]] = []
        for sample in self._samples(messages, flags, author, tools, allow_lossy=allow_lossy):
            if max_tokens is None or _num_tokens(sample.spans) <= max_tokens:
                samples.append(sample.spans)
            elif overlong == "split":
                samples += self._split(messages, sample.turns, author, tools, max_tokens, allow_lossy=allow_lossy)
            elif overlong == "error":
                raise TemplateError(
                    f"a sample must have at most {max_tokens} tokens, got {_num_tokens(sample.spans)} (up to message "
                    f'{sample.turns[-1]}). Raise the limit, or set overlong to "split" or "drop".'
                )
        return samples

    def _samples(
        self,
        messages: Sequence[Message],
        flags: Sequence[bool],
        author: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        allow_lossy: bool,
    ) -> list["_Sample"]:
        wanted = [i for i, flag in enumerate(flags) if flag]
        if not wanted:
            raise TemplateError(
                f"a conversation to train on needs an assistant turn to learn, got roles "
                f"{[m.get('role') for m in messages]} with none marked for training. Check the roles, the messages' "
                "trainable, loss and weight, and train."
            )
        escaper = Escaper(self._patterns)
        escaped = escaper.messages(self._renderer.prepare(messages))
        escaped_tools = escaper.tools(tools)
        groups: list[list[Turn]] = []
        for index in wanted:
            turn = find_turn(self._renderer, self._encoder.written, self.report, escaped, escaped_tools, index)
            lost = "" if allow_lossy else lost_text(turn, escaped[index])
            if lost:
                raise TemplateError(
                    f"the chat template silently drops what the assistant says in message {index}: {lost[:60]!r}. "
                    "Use a template that shows it (template=), or allow the loss (allow_lossy=True)."
                )
            if groups and turn.keeps(groups[-1][-1]):
                groups[-1].append(turn)
            else:
                groups.append([turn])
        return [self._sample(escaped, escaped_tools, escaper.table, turns, author) for turns in groups]

    def _sample(
        self,
        escaped: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        escapes: Mapping[str, str],
        turns: list[Turn],
        author: str,
    ) -> "_Sample":
        last = turns[-1]
        shown = escaped[: last.index + 1]
        rendered = render_marked(self._renderer, self._patterns, shown, tools, generated=True)
        added = "" if last.has_stop else self._added_stop(last)
        stop_at = len(rendered.text)
        rendered = replace(rendered, escapes=dict(escapes), text=rendered.text + added)
        if added:
            rendered = replace(rendered, controls=(*rendered.controls, (stop_at, stop_at + len(added))))
        labels = label_sample(rendered, self.report, turns, [str(m["role"]) for m in shown], author)
        encoded, moved = self._encoder.encode(rendered, cuts=labels.cuts)
        spans = to_spans(encoded, labels.moved(moved))
        trained = sum(len(s.token_ids) for s in spans if s.is_trainable)
        total = _num_tokens(spans)
        if trained == 0 or trained == total:
            share = "none" if trained == 0 else "all"
            raise TemplateError(
                f"some, and not all, of a sample's tokens must be trained, got {share} of {total} (up to message "
                f"{last.index}). "
                + (
                    "The assistant's turn is empty or the template drops it: take it out or mark it trainable=False."
                    if trained == 0
                    else "Start the conversation with a user or system message."
                )
            )
        return _Sample(spans, [t.index for t in turns])

    def _added_stop(self, turn: Turn) -> str:
        """The stop token of a last turn that the template leaves open."""
        role = "tool" if turn.is_call else "user"
        eos = self.tokenizer.eos_token
        stop = self.report.stop_in_next.get(role) or eos or self.report.stop_in_next.get("user")
        if not stop:
            raise TemplateError(
                "a turn must end with a stop token, and neither the chat template nor the tokenizer has one. "
                "Set tokenizer.eos_token."
            )
        return str(stop)

    def _split(
        self,
        messages: Sequence[Message],
        turns: Sequence[int],
        author: str,
        tools: Sequence[Mapping[str, Any]],
        limit: int,
        *,
        allow_lossy: bool,
    ) -> list[list[Span]]:
        """Samples of whole turns that fit, each turn trained once, with as much of the latest context as fits."""

        def attempt(chat: Sequence[Message], wanted: Sequence[int]) -> list["_Sample"] | None:
            flags = [i in wanted for i in range(len(chat))]
            found = self._samples(chat, flags, author, tools, allow_lossy=allow_lossy)
            return found if all(_num_tokens(s.spans) <= limit for s in found) else None

        samples: list[list[Span]] = []
        rest = list(turns)
        while rest:
            chosen: list[_Sample] | None = None
            for chat, shift in _windows(messages, rest[0]):
                for count in range(len(rest), 0, -1):
                    tail = messages[rest[0] + 1 : rest[count - 1] + 1]
                    chosen = attempt([*chat, *tail], [i - shift for i in rest[:count]])
                    if chosen is not None:
                        samples += [s.spans for s in chosen]
                        rest = rest[count:]
                        break
                if chosen is not None:
                    break
            if chosen is None:
                raise TemplateError(
                    f"a sample must have at most {limit} tokens, and message {rest[0]} does not fit even with only the "
                    'system message and its question. Raise the limit, or set overlong to "drop".'
                )
        return samples

    # --- tokens --------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def completion_text(self, ids: Sequence[int]) -> str:
        """The text of a sampled turn without its stop token."""
        ends = len(ids) > 0 and ids[-1] in self.stop_ids
        return self.decode(ids[:-1] if ends else ids)

    def literal_ids(self, text: str) -> tuple[int, ...]:
        """Ids of text in which control tokens are plain text."""
        return tuple(self._encoder.literal_ids(text))

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends the assistant's turn: from the template, the tokenizer and the generation config."""
        ids: dict[int, None] = {}
        for stop in self.report.stops:
            if stop in self._encoder.control_ids:
                ids[self._encoder.control_ids[stop]] = None
        configured = getattr(self._generation_config, "eos_token_id", None)
        configured = configured if isinstance(configured, list | tuple) else [configured]
        ids |= {int(i): None for i in (self.tokenizer.eos_token_id, *configured) if i is not None}
        return tuple(ids)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop tokens as text, for servers that stop on strings."""
        return tuple(self.decode([i]) for i in self.stop_ids)

    def check_eos_pad(self) -> EosPad | None:
        """What is wrong with the padding token, and a better one; None where all is well."""
        return check_eos_pad(self.tokenizer, self.stop_ids)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's content (vocabulary, merges, added tokens). The template has its own."""
        return self._encoder.fingerprint

    @property
    def template_fingerprint(self) -> str:
        """Hash of the chat template and its settings."""
        return content_hash(self.template, self.template_kwargs)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer and the template in use to a model's folder; `from_pretrained` reads them back.

        The padding token is written as it is: see `check_eos_pad`.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = self.template
        tokenizer.save_pretrained(str(folder))

    def same_vocabulary(self, other: "ChatText | Any") -> bool:
        """True where the other tokenizer gives the same ids to the same text, whatever the width of its vocabulary."""
        return not self.vocabulary_differences(other)

    def vocabulary_differences(self, other: "ChatText | Any") -> list[str]:
        """Where two tokenizers part, in sentences: shared tokens with other ids, texts with other tokens."""
        theirs = other.tokenizer if isinstance(other, ChatText) else other
        return vocabulary_differences(self.tokenizer, theirs)


@dataclass(frozen=True)
class _Sample:
    spans: list[Span]
    turns: list[int]


def train_flags(messages: Sequence[Message], train: str = "all") -> list[bool]:
    """For each message, whether it is trained on: by its own `trainable`, `loss` or `weight`, else by `train`.

    Raises:
        TemplateError: `train` is unknown, a flag is not 0 or 1, or one asks to train what the assistant did not say.
    """
    if train not in ("all", "last"):
        raise TemplateError(f'train must be "all" or "last", got {train!r}')
    said = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    flags = []
    for i, m in enumerate(messages):
        own = next((m[k] for k in ("trainable", "loss", "weight") if m.get(k) is not None), None)
        if own is not None and own not in (0, 1):
            raise TemplateError(
                f"message {i} needs 0 or 1 (false or true) as its trainable, loss or weight, got {own!r}. "
                "Weights between apply to whole trajectories, not to messages."
            )
        if own and i not in said:
            raise TemplateError(
                f"message {i} has the role {m.get('role')!r} and asks to be trained on: only what the assistant says "
                "can be. Remove its trainable, loss or weight."
            )
        flags.append(bool(own) if own is not None else i in said and (train == "all" or i == said[-1]))
    return flags


def _windows(messages: Sequence[Message], last: int) -> Iterable[tuple[list[Message], int]]:
    """The conversation up to message `last`, then ever shorter ones that keep the system messages, each with the number
    of messages left out. They begin at user messages."""
    lead = list(itertools.takewhile(lambda m: m.get("role") in ("system", "developer"), messages))
    starts = [i for i in range(len(lead), last) if messages[i].get("role") == "user"]
    for start in starts if starts[:1] == [len(lead)] else [len(lead), *starts]:
        yield [*lead, *messages[start : last + 1]], start - len(lead)


def _num_tokens(spans: Iterable[Span]) -> int:
    return sum(len(s.token_ids) for s in spans)


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _template_text(tokenizer: Any, template: str | Path | None) -> str:
    if isinstance(template, Path) or (isinstance(template, str) and template.endswith(".jinja")):
        try:
            return Path(template).read_text(encoding="utf-8")
        except OSError as error:
            raise TemplateError(f"the chat template file {template} cannot be read: {error}") from error
    if template is not None:
        return template
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    if not own:
        raise TemplateError(
            f"a chat template is needed, and the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has none (it "
            "belongs to a base model). Pass template= with a Jinja file, e.g. that of the same family's chat model, "
            "and make sure its control tokens are in the vocabulary."
        )
    return str(own)


__all__ = ["TEMPLATE_DATE", "ChatText", "Continuation", "EosPad", "train_flags"]
