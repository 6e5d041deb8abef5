"""Choose trajectories from a store of any size: one pass over a few columns, then a mask over the rows.

Memory: about 40 bytes for each row of the store while it is scanned, and about 60 more for each candidate (a row that
no rule of its own leaves out) while the choice is made: 100 MB for a million. Prompts and texts are compared by
64-bit hashes: among a million rows, two different ones are taken for one with a chance of 3 in 10^8.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from tutelage.data.rows import encode, to_row
from tutelage.data.store import TrajectoryStore
from tutelage.errors import ConfigError
from tutelage.types import Status, Trajectory

COLUMNS = (
    *("task_hash", "text_hash", "verdict_status", "verdict_score", "verdict_key"),
    *("finish", "num_tokens", "num_sampled"),
)

MARKED = ("weight", "marks")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRules:
    """What is kept. Rules apply in the order of these fields; where one of several is kept, order decides which."""

    is_weighted: bool = False
    """Leave out what has weight 0 already; it counts under its last mark."""
    is_accepted: bool = True
    """Keep only what a verifier accepted. Without a verdict, or with an error, it was not."""
    min_score: float | None = None
    """Keep only verdicts of at least this score."""
    is_whole: bool = False
    """Leave out completions cut off by their length limit."""
    max_tokens: int | None = None
    """Leave out longer trajectories."""
    is_unique: bool = False
    """Keep one of trajectories with equal text, whatever their prompt."""
    distinct: Literal["text", "key"] | None = None
    """Keep one of a prompt's trajectories with equal text, or with an equal key of the verifier (text where none)."""
    max_per_prompt: int | None = None
    """Keep at most this many of a prompt."""
    order: Literal["first", "shortest"] = "first"
    """Which are kept where not all are: those that come first, or those with the fewest sampled tokens."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("max_tokens", "max_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1 or None, got {value}")
        if self.distinct not in (None, "text", "key"):
            problems.append(f'distinct must be "text", "key" or None, got {self.distinct!r}')
        if self.order not in ("first", "shortest"):
            problems.append(f'order must be "first" or "shortest", got {self.order!r}')
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows are kept, and why the others are not."""

    is_kept: np.ndarray
    """(rows,) True where the row is kept."""
    left_out: Mapping[str, int]
    """Rows left out by each rule that left any out; each row counts once, for the first rule."""

    @property
    def num_kept(self) -> int:
        return int(self.is_kept.sum())

    def of(self, source: TrajectoryStore | Iterable[Trajectory]) -> Iterator[Trajectory]:
        """The kept trajectories of the source the selection was made of, in order, one at a time."""
        if isinstance(source, TrajectoryStore):
            yield from source.read(where=lambda row: bool(self.is_kept[row]))
        else:
            yield from (t for t, keep in zip(source, self.is_kept, strict=True) if keep)


def select(source: TrajectoryStore | Iterable[Trajectory], rules: SelectionRules) -> Selection:
    """Apply the rules to a store, or to trajectories that can be gone through again for `Selection.of`."""
    table = _Table(rules)
    columns = [*COLUMNS, *(MARKED if rules.is_weighted else ())]
    if isinstance(source, TrajectoryStore):
        for batch in source.scan(columns, batch_rows=4096):
            table.add(batch)
    else:
        for t in source:
            table.add(encode(to_row(t)).select(columns))
    return table.choose()


class _Table:
    """Of each candidate: row, prompt, text, what distinctness compares, length; of the others, only their count."""

    def __init__(self, rules: SelectionRules) -> None:
        self.rules, self.num_rows = rules, 0
        self.left_out: dict[str, int] = {}
        self.row, self.prompt, self.text, self.same = array("q"), array("Q"), array("Q"), array("Q")
        self.length = array("q")

    def add(self, batch: pa.RecordBatch) -> None:
        reasons = self._marked_out(batch) if self.rules.is_weighted else [None] * len(batch)
        for reason, *row in zip(reasons, *(batch.column(name).to_pylist() for name in COLUMNS), strict=True):
            if reason is None:
                self._add(*row)
            else:
                self.num_rows += 1
                self._leave(reason)

    def _marked_out(self, batch: pa.RecordBatch) -> list[str | None]:
        """Why a row has weight 0."""
        weights, marks = (batch.column(name).to_pylist() for name in MARKED)
        return [None if w else (m[-1] if m else "weight 0") for w, m in zip(weights, marks, strict=True)]

    def _add(
        self,
        task: str,
        text: str,
        status: str | None,
        score: float | None,
        key: str | None,
        finish: str,
        num_tokens: int,
        num_sampled: int,
    ) -> None:
        rules = self.rules
        number, self.num_rows = self.num_rows, self.num_rows + 1
        if rules.is_accepted and status != Status.ACCEPT:
            return self._leave("unjudged" if status is None else str(status))
        if rules.min_score is not None and (score is None or not score >= rules.min_score):
            return self._leave("score")
        if rules.is_whole and finish == "length":
            return self._leave("truncated")
        if rules.max_tokens is not None and num_tokens > rules.max_tokens:
            return self._leave("too long")
        said = f"text {text}" if rules.distinct == "text" or key is None else f"key {key}"
        self.row.append(number)
        self.prompt.append(_hash(task))
        self.text.append(_hash(text))
        self.same.append(_hash(f"{task} {said}"))
        self.length.append(num_sampled)

    def _leave(self, rule: str, count: int = 1) -> None:
        if count:
            self.left_out[rule] = self.left_out.get(rule, 0) + count

    def choose(self) -> Selection:
        rules = self.rules
        chosen = np.arange(len(self.row))
        if rules.order == "shortest":
            chosen = np.argsort(_view(self.length), kind="stable")
        if rules.is_unique:
            chosen = self._first("equal text", chosen, self.text)
        if rules.distinct is not None:
            chosen = self._first("not distinct", chosen, self.same)
        if rules.max_per_prompt is not None:
            chosen = self._capped(chosen, rules.max_per_prompt)
        is_kept = np.zeros(self.num_rows, dtype=bool)
        is_kept[_view(self.row)[chosen]] = True
        return Selection(is_kept=is_kept, left_out=dict(self.left_out))

    def _first(self, rule: str, chosen: np.ndarray, values: array) -> np.ndarray:
        """The first of equal values in the order of `chosen`, which it keeps."""
        _, first = np.unique(_view(values)[chosen], return_index=True)
        self._leave(rule, len(chosen) - len(first))
        return np.asarray(chosen[np.sort(first)])

    def _capped(self, chosen: np.ndarray, cap: int) -> np.ndarray:
        prompts = _view(self.prompt)[chosen]
        by_prompt = np.argsort(prompts, kind="stable")
        ordered = prompts[by_prompt]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
        sizes = np.diff(np.append(starts, len(ordered)))
        rank = np.arange(len(ordered)) - np.repeat(starts, sizes)
        kept = np.sort(by_prompt[rank < cap])
        self._leave("over the cap", len(chosen) - len(kept))
        return np.asarray(chosen[kept])


def _view(values: "array[Any]") -> np.ndarray:
    return np.frombuffer(values, dtype=np.dtype(values.typecode)) if len(values) else np.zeros(0, values.typecode)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
