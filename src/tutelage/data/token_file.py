"""Trajectories to train on, on disk by number: any one is read without the others, whatever the order.

Three flat files beside each other: `tokens.i32` (ids), `runs.i32` (runs of tokens that may or may not be trained:
start in the file, length, 1 or 0), and `rows.i64` (first run, number of runs, targets, weight's bits). Only `rows.i64`
is read into memory: 32 bytes a trajectory. Text, log-probabilities and verdicts stay in the trajectory store.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from tutelage.data.files import atomic_file, check_exists
from tutelage.data.store import TrajectoryStore
from tutelage.errors import DataError
from tutelage.types import Span, Trajectory

NAMES = ("tokens.i32", "runs.i32", "rows.i64")
DONE = "done.json"


Row = tuple[np.ndarray, np.ndarray, int, float]
"""Token ids, whether each may be trained, number of targets, weight."""


def write_token_file(folder: Path, rows: Iterable[Row]) -> "TokenFile":
    """Write a stream of rows (`rows_of_store`, `rows_of_trajectories`); nothing is written where it was done before.

    Raises:
        DiskError: the disk; there is then no token file.
    """
    if not (folder / DONE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        count = _write(folder, rows)
        with atomic_file(folder / DONE, kept="") as file:
            file.write(json.dumps({"rows": count}).encode())
    return TokenFile(folder)


def rows_of_trajectories(trajectories: Iterable[Trajectory]) -> Iterator[Row]:
    for t in trajectories:
        flags = [s.is_trainable for s in t.spans for _ in s.token_ids]
        yield np.array(t.token_ids, dtype=np.int32), np.array(flags, dtype=bool), t.num_targets, t.weight


def rows_of_store(store: TrajectoryStore, is_kept: np.ndarray) -> Iterator[Row]:
    """Of the kept rows of a store that have targets, read from four columns without making trajectories."""
    first = 0
    for batch in store.scan(["token_ids", "is_trainable", "num_targets", "weight"], batch_rows=512):
        ids, flags = (_flat(batch.column(i)) for i in (0, 1))
        counts, weights = (batch.column(i).to_pylist() for i in (2, 3))
        for i in np.flatnonzero(is_kept[first : first + batch.num_rows]).tolist():
            if counts[i]:
                yield _part(ids, i).astype(np.int32), _part(flags, i).astype(bool), counts[i], weights[i]
        first += batch.num_rows


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list column."""
    return column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()


def _part(flat: tuple[np.ndarray, np.ndarray], index: int) -> np.ndarray:
    values, offsets = flat
    return values[offsets[index] : offsets[index + 1]]


def _write(folder: Path, parts: Iterable[Row]) -> int:
    num_tokens = num_runs = count = 0
    kept = "Nothing else was touched."
    with (
        atomic_file(folder / NAMES[0], kept=kept) as tokens,
        atomic_file(folder / NAMES[1], kept=kept) as runs,
        atomic_file(folder / NAMES[2], kept=kept) as rows,
    ):
        for ids, flags, num_targets, weight in parts:
            starts = np.flatnonzero(np.concatenate([[True], flags[1:] != flags[:-1]])) if len(ids) else np.zeros(0, int)
            tokens.write(ids.astype(np.int32, copy=False).tobytes())
            runs.write(_runs(num_tokens, starts, flags).tobytes())
            bits = int(np.float64(weight).view(np.int64))
            rows.write(np.array([num_runs, len(starts), num_targets, bits], dtype=np.int64).tobytes())
            num_tokens, num_runs, count = num_tokens + len(ids), num_runs + len(starts), count + 1
    return count


def _runs(base: int, starts: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """(runs, 4) low and high part of the place in the file, length, flag: places may pass 2^31."""
    out = np.empty((len(starts), 4), dtype=np.int32)
    places = starts.astype(np.int64) + base
    out[:, 0], out[:, 1] = places & 0x7FFFFFFF, places >> 31
    out[:, 2], out[:, 3] = np.diff(np.append(starts, len(flags))), flags[starts]
    return out


class TokenFile(Sequence[Trajectory]):
    """What `write_token_file` wrote: `file[i]` is a trajectory with its tokens, targets and weight, and nothing else.

    Memory: 32 bytes a trajectory; tokens are mapped from the disk.

    Raises:
        DataError: there is none, it was not finished, or its files do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        check_exists(folder / DONE, "a finished token file")
        count = int(json.loads((folder / DONE).read_text())["rows"])
        self.folder = folder
        self._rows = np.fromfile(folder / NAMES[2], dtype=np.int64).reshape(-1, 4)
        self._runs = _mapped(folder / NAMES[1]).reshape(-1, 4)
        self._tokens = _mapped(folder / NAMES[0])
        if len(self._rows) != count or (count and self._rows[-1, :2].sum() != len(self._runs)):
            raise DataError(f"{folder}: {len(self._rows)} rows and {len(self._runs)} runs, {count} rows were written")

    @property
    def num_targets(self) -> np.ndarray:
        """(rows,) tokens that loss may fall on."""
        return np.asarray(self._rows[:, 2])

    @property
    def weights(self) -> np.ndarray:
        return np.ascontiguousarray(self._rows[:, 3]).view(np.float64)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> "list[Trajectory]": ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first, num_runs, _, bits = (int(v) for v in self._rows[index])
        spans = []
        for low, high, length, flag in self._runs[first : first + num_runs].tolist():
            start = low + (high << 31)
            ids = tuple(self._tokens[start : start + length].tolist())
            role = "assistant" if flag else "template"
            spans.append(
                Span(token_ids=ids, role=role, author="stored", is_sampled=bool(flag), is_trainable=bool(flag))
            )
        name = f"{self.folder.name}-{index}"
        weight = float(np.int64(bits).view(np.float64))
        return Trajectory(id=name, task_id=name, task_hash="", spans=tuple(spans), weight=weight)


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.int32, mode="r") if path.stat().st_size else np.zeros(0, dtype=np.int32)
