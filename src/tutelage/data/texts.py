"""Plain text as trajectories: documents cut into pieces of tokens, every one of them to be predicted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.data.tasks import Problem
from tutelage.errors import DataError
from tutelage.types import Group, Span, Task, Trajectory, content_hash


class Texts(NamedTuple):
    """Pieces of text, each a group of one trajectory, and what could not be read."""

    groups: list[Group]
    problems: list[Problem]


def load_texts(
    path: Path | str, tokenizer: Any, *, field: str = "text", max_length: int = 256, name: str = "pretraining"
) -> Texts:
    """Read documents and cut them into pieces of at most `max_length` tokens.

    A document's tokens are followed by the tokenizer's `<|endoftext|>` where it has that token, else by its
    end-of-sequence token, so that documents are told apart as in pretraining; no chat template is applied.

    Args:
        path: .txt, documents parted by empty lines; or JSON lines.
        field: JSON lines: the field with the text.
        name: task family of the pieces.

    Raises:
        DataError: the file is missing, or holds no usable document.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; needed: .txt, or JSON lines with a field {field!r}")
    vocabulary = tokenizer.get_vocab()
    end = vocabulary.get("<|endoftext|>", tokenizer.eos_token_id)
    groups: list[Group] = []
    problems: list[Problem] = []
    for origin, text in _documents(path, field, problems):
        ids = [*tokenizer.encode(text, add_special_tokens=False), *([] if end is None else [end])]
        for start in range(0, len(ids), max_length):
            piece = tuple(ids[start : start + max_length])
            if len(piece) > 1:  # the first token has nothing to be predicted from
                groups.append(_group(piece, f"{origin}+{start}", name))
    if not groups:
        first = f"; first problem: {problems[0].origin}: {problems[0].reason}" if problems else ""
        raise DataError(f"{path}: no usable text{first}")
    return Texts(groups, problems)


def _documents(path: Path, field: str, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    if path.suffix == ".txt":
        for i, part in enumerate(path.read_text(encoding="utf-8").split("\n\n")):
            if part.strip():
                yield f"{path.name}#{i}", part.strip()
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        origin = f"{path.name}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(Problem(origin, f"not JSON: {error.msg}"))
            continue
        text = record.get(field) if isinstance(record, dict) else None
        if isinstance(text, str) and text.strip():
            yield origin, text
        else:
            problems.append(Problem(origin, f"field {field!r} must be a text, got {type(text).__name__}"))


def _group(ids: tuple[int, ...], origin: str, name: str) -> Group:
    task = Task(id=origin, messages=(), name=name)
    span = Span(token_ids=ids, role="text", author="human", is_sampled=True, is_trainable=True)
    trajectory = Trajectory(
        id=f"text-{content_hash(origin, ids)}",
        task_id=task.id,
        task_hash=task.hash,
        task_name=name,
        spans=(span,),
        origin=origin,
    )
    return Group(task=task, trajectories=(trajectory,))
