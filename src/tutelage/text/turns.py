"""Where the assistant speaks in a rendered conversation, and who wrote each token of it."""

import bisect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tutelage.errors import TemplateError
from tutelage.text.encode import Encoded
from tutelage.text.probe import TemplateReport, common_length
from tutelage.text.render import Rendered, TemplateRenderer, marked
from tutelage.types import Span


@dataclass(frozen=True)
class Turn:
    """One turn to train on, in the rendering of the conversation that ends with it."""

    index: int
    """Which message."""
    text: str
    """The conversation up to and including this turn, as rendered (escaped)."""
    start: int
    """First character that the assistant writes."""
    stop: int
    """One past its last, the stop token included where the template writes one."""
    has_stop: bool
    is_call: bool
    """True where the turn calls a tool."""

    def keeps(self, earlier: "Turn") -> bool:
        """True where the earlier turn, and all before it, is rendered the same here."""
        return self.text.startswith(earlier.text[: earlier.stop])


@dataclass(frozen=True)
class Label:
    """Whose a stretch of text is."""

    role: str
    author: str
    message: int = -1
    is_sampled: bool = False
    is_trainable: bool = False


_TEMPLATE = Label("template", "template")


@dataclass(frozen=True)
class Labels:
    """Stretches [start, stop) of a rendered text in order, each with its label; the template wrote the rest."""

    parts: tuple[tuple[int, int, Label], ...]

    @property
    def cuts(self) -> list[int]:
        """Where a token must end: the borders of what is trained."""
        return [x for a, b, label in self.parts if label.is_trainable for x in (a, b)]

    def moved(self, moved: Mapping[int, int]) -> "Labels":
        """The same with the borders where the tokenizer has them."""
        return Labels(tuple((moved.get(a, a), moved.get(b, b), label) for a, b, label in self.parts))

    def at(self, characters: Iterable[int]) -> list[Label]:
        starts = [a for a, _, _ in self.parts]
        out = []
        for c in characters:
            i = bisect.bisect_right(starts, c) - 1
            out.append(self.parts[i][2] if i >= 0 and c < self.parts[i][1] else _TEMPLATE)
        return out


def find_turn(
    renderer: TemplateRenderer,
    controls: re.Pattern[str],
    report: TemplateReport,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    index: int,
) -> Turn:
    """Where message `index` speaks when it is the last: from the end of the prompt's header to its stop token.

    Raises:
        TemplateError: adding the turn changes how the messages before it are rendered.
    """
    before, message = messages[:index], messages[index]
    text = renderer.render(messages[: index + 1], tools)
    prompt = renderer.render(before, tools, prompt=True) if before else _first_header(text, report)
    start = len(prompt)
    if not text.startswith(prompt):
        # The header asks for something (a think block) that the answered turn does not have. Marks around the
        # content keep a content that begins like the header's rest from being taken for it.
        marks = renderer.render([*before, *marked([message], lambda role: True)], tools)
        start = common_length(prompt, marks, controls)
        bare = renderer.render(before, tools) if before else ""
        if start < common_length(bare, prompt, controls):
            raise TemplateError(
                f"the chat template renders the messages before message {index} differently once it is there: after "
                f"{start} characters {text[start : start + 40]!r} instead of {prompt[start : start + 40]!r}. It cannot "
                "be said which tokens the assistant wrote; use another template."
            )
    if report.header and text.startswith(report.header, start):  # a prompt without a header, as after tool results
        start += len(report.header)
    if not _has_reasoning(message):
        blank = report.empty_reasoning
        # Not the blanks after it where it is followed by something else than in the probe.
        blank = next((b for b in (blank, blank.rstrip()) if b and text.startswith(b, start)), "")
        start += len(blank)
    stop = _stop_end(text, start, controls, {report.stop, report.call_stop})
    return Turn(
        index=index,
        text=text,
        start=start,
        stop=len(text) if stop is None else stop,
        has_stop=stop is not None,
        is_call=bool(message.get("tool_calls")),
    )


def lost_text(turn: Turn, message: Mapping[str, Any]) -> str:
    """What the assistant said in a turn and the rendered turn does not have, "" if nothing; blanks do not count."""
    shown = "".join(turn.text[turn.start :].split())
    said = [message.get("reasoning_content"), *re.split(r"</?think>", _content(message))]
    return next((s for s in said if s and "".join(s.split()) not in shown), "")


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "".join(p["text"] for p in content or ())


def _first_header(text: str, report: TemplateReport) -> str:
    """Everything up to the assistant's first words, for a conversation that begins with them."""
    at = text.find(report.header)
    if at < 0:
        raise TemplateError(
            "a conversation must begin with a user or system message, got the assistant's, and the chat template does "
            f"not begin its turn with {report.header!r}. Put the message that was answered before it."
        )
    return text[: at + len(report.header)]


def _has_reasoning(message: Mapping[str, Any]) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in _content(message)


def _stop_end(text: str, start: int, controls: re.Pattern[str], stops: set[str]) -> int | None:
    """One past the stop token, if only blanks and other control tokens follow it."""
    end = len(text)
    for match in reversed(list(controls.finditer(text, start))):
        if text[match.end() : end].strip():
            return None
        if match[0].strip() in stops:
            return match.start() + len(match[0].rstrip())
        end = match.start()
    return None


def label_prompt(rendered: Rendered, roles: Sequence[str]) -> Labels:
    """Whose each stretch of a prompt is: nothing in it is trained."""
    return Labels(tuple((r.start, r.stop, _spoken(roles[r.message], r.message)) for r in rendered.regions))


def _spoken(role: str, message: int) -> Label:
    author = {"tool": "environment", "assistant": "human"}.get(role, "user")
    return Label(role, author, message)


def label_sample(
    rendered: Rendered, report: TemplateReport, turns: Sequence[Turn], roles: Sequence[str], author: str
) -> Labels:
    """Whose each stretch of a demonstration is; `turns` are trained, other assistant turns are context.

    Raises:
        TemplateError: the template's `{% generation %}` markers leave out what the assistant said.
    """
    trained: list[tuple[int, int, Label]] = []
    for turn in turns:
        label = Label("assistant", author, turn.index, is_sampled=True, is_trainable=True)
        stop = turn.stop
        if not turn.has_stop:  # the stop token is what begins the next message, or was added at the end
            stops = {*report.stop_in_next.values()} if turn is not turns[-1] else None
            stop = _next_stop_end(rendered, turn.stop, stops)
        if rendered.generated is None:
            trained.append((turn.start, stop, label))
        else:
            trained += [(a, b, label) for a, b in _generated(rendered, turn, stop)]
    others = []
    for region in rendered.regions:
        if not any(a < region.stop and region.start < b for a, b, _ in trained):
            label = _spoken(roles[region.message], region.message)
            if label.role == "assistant":
                label = replace(label, author=author, is_sampled=True)
            others.append((region.start, region.stop, label))
    return Labels(tuple(sorted([*trained, *others], key=lambda p: p[:2])))


def _next_stop_end(rendered: Rendered, at: int, stops: set[str] | None) -> int:
    for start, stop in rendered.controls:
        if start >= at and not rendered.text[at:start].strip():
            if stops is None or rendered.text[start:stop].strip() in stops:
                return stop
            break
    return at


def _generated(rendered: Rendered, turn: Turn, stop: int) -> list[tuple[int, int]]:
    """What the template's markers say the assistant wrote in this turn, checked, with the stop token."""
    spans = [(max(a, turn.start), min(b, stop)) for a, b in rendered.generated or () if a < stop and b > turn.start]
    for region in rendered.regions:
        if region.message == turn.index and not any(a <= region.start and region.stop <= b for a, b in spans):
            raise TemplateError(
                f"the chat template's {{% generation %}} markers leave out what the assistant says in message "
                f"{turn.index}: {rendered.plain(region.start, min(region.stop, region.start + 40))!r}. "
                "Fix the markers, or use a template without them: the mask then comes from rendering prefixes."
            )
    if not spans:
        return [(turn.start, stop)]
    last = spans[-1]
    if last[1] < stop:  # the stop token stands outside the markers
        spans[-1] = (last[0], stop)
    return spans


def to_spans(encoded: Encoded, labels: Labels) -> list[Span]:
    """Consecutive tokens with one label become a span. A token is labelled by the last character it covers."""
    found = labels.at(encoded.last)
    spans = []
    for label, group in itertools.groupby(zip(encoded.ids, found, strict=True), key=lambda pair: pair[1]):
        spans.append(
            Span(
                token_ids=tuple(i for i, _ in group),
                role=label.role,
                author=label.author,
                is_sampled=label.is_sampled,
                is_trainable=label.is_trainable,
            )
        )
    return spans
