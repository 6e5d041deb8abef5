"""Demonstrations from files: conversations to imitate, in the forms people keep them in.

Every record becomes a `Demo` or a `Problem`, never nothing; no message is invented, and none is left out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from tutelage.data.forms import FORMS, Conversation, parse_record
from tutelage.data.quarantine import Quarantine
from tutelage.data.records import data_files, iter_records
from tutelage.errors import ConfigError, DataError
from tutelage.types import Message

OnBadRecord = Literal["quarantine", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """One conversation to learn from."""

    messages: tuple[Message, ...]
    """OpenAI form, ending with the assistant. A message that its record says is (not) to be learned has `trainable`."""
    tools: tuple[Mapping[str, Any], ...]
    """Tool definitions in OpenAI form."""
    origin: str
    """`file:line`; the file is named from the folder that was given, so that it is the same on any machine."""
    extra: Mapping[str, Any]
    """`record`: the record's other fields. `message_fields`: other fields of its messages, by index.
    `reserialised_arguments`: tool calls whose arguments were objects and are now JSON text."""

    @property
    def train(self) -> tuple[bool, ...]:
        """Which messages are learned: the assistant's, except where the record says not."""
        return tuple(m["role"] == "assistant" and bool(m.get("trainable", True)) for m in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A record that cannot be used."""

    file: str
    line: int
    reason: str
    raw: str
    """The record as it stands in the file."""

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(slots=True, kw_only=True)
class Loaded:
    """All demonstrations of a path, and what could not be used."""

    demos: list[Demo] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read(
    path: str | Path,
    *,
    format: str = "auto",
    on_bad_record: OnBadRecord = "quarantine",
    on_problem: Callable[[Problem], None] | None = None,
    quarantine: Quarantine | None = None,
) -> Iterator[Demo]:
    """The demonstrations of a file, or of every file of a folder, one at a time.

    Forms, by the fields of a record: `messages` (OpenAI, with `tools`); `conversations` (ShareGPT, with its tool
    forms); `prompt` and `completion` (text or messages; only the completion is learned); `instruction`, `input` and
    `output` (Alpaca); `question` and `answer` (GSM8K).

    Args:
        path: JSONL, JSON or Parquet (JSON also compressed with gzip), or a folder of them.
        format: "auto" looks at each record; a form's name reads all of them so.
        on_bad_record: "quarantine" goes on; "error" stops at the first.
        on_problem: called with each unusable record.
        quarantine: keeps each unusable record.

    Raises:
        ConfigError: format or on_bad_record is unknown.
        DataError: nothing is at the path (the nearest names are given); a record is unusable and `on_bad_record` is
            "error"; a file has records and none can be used, or has none (raised at the end of that file).
    """
    form = _form(format)
    if on_bad_record not in ("quarantine", "error"):
        raise ConfigError(f'on_bad_record must be "quarantine" or "error", got {on_bad_record!r}')
    path = Path(path)
    for file in data_files(path):
        name = file.name if file == path else file.relative_to(path).as_posix()
        good, bad = 0, 0
        first: list[str] = []
        for record in iter_records(file):
            reason, conversation = record.reason, None
            if record.value is not None:
                try:
                    conversation = parse_record(record.value, form)
                except ValueError as error:
                    reason = str(error)
            if conversation is not None:
                good += 1
                yield _demo(conversation, f"{name}:{record.line}")
                continue
            problem = Problem(file=name, line=record.line, reason=reason, raw=record.raw)
            if on_bad_record == "error":
                raise DataError(f"{problem.origin}: {reason}. Repair or remove it, or set on_bad_record to quarantine.")
            bad += 1
            first += [f"{problem.origin}: {reason}"] if len(first) < 3 else []
            if on_problem is not None:
                on_problem(problem)
            if quarantine is not None:
                quarantine.add(file=name, line=record.line, reason=reason, raw=record.raw)
        if not good:
            listed = "".join(f"\n  {line}" for line in first)
            said = f"none of its {bad} records can be used. The first:{listed}" if bad else "it is empty"
            raise DataError(f"{file} must hold demonstrations, and {said}")


def load(
    path: str | Path, *, format: str = "auto", on_bad_record: OnBadRecord = "quarantine", limit: int | None = None
) -> Loaded:
    """All demonstrations of a path in memory, or the first `limit`, and every problem met on the way.

    Raises:
        ConfigError, DataError: as for `read`; limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 or None, got {limit}")
    loaded = Loaded()
    for demo in read(path, format=format, on_bad_record=on_bad_record, on_problem=loaded.problems.append):
        loaded.demos.append(demo)
        if len(loaded.demos) == limit:
            break
    return loaded


def _demo(conversation: Conversation, origin: str) -> Demo:
    return Demo(
        messages=tuple(conversation.messages),
        tools=tuple(conversation.tools),
        origin=origin,
        extra=conversation.extra,
    )


def _form(name: str) -> str:
    known = ("auto", *FORMS)
    form = name.lower().replace("-", "_")
    if form not in known:
        near = get_close_matches(form, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"format must be one of {', '.join(known)}, got {name!r}{hint}")
    return form
