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
from tutelage.errors import DataError
from tutelage.types import Span, Trajectory

NAMES = ("tokens.i32", "runs.i32", "rows.i64")
DONE = "done.json"


def write_token_file(folder: Path, trajectories: Iterable[Trajectory]) -> "TokenFile":
    """Write a stream of trajectories; one of them is in memory at a time. Nothing is written where it was done before.

    Raises:
        DiskError: the disk; there is then no token file.
    """
    if not (folder / DONE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        count = _write(folder, trajectories)
        with atomic_file(folder / DONE, kept="") as file:
            file.write(json.dumps({"rows": count}).encode())
    return TokenFile(folder)


def _write(folder: Path, trajectories: Iterable[Trajectory]) -> int:
    num_tokens = num_runs = count = 0
    kept = "Nothing else was touched."
    with (
        atomic_file(folder / NAMES[0], kept=kept) as tokens,
        atomic_file(folder / NAMES[1], kept=kept) as runs,
        atomic_file(folder / NAMES[2], kept=kept) as rows,
    ):
        for t in trajectories:
            found = []
            for span in t.spans:
                if span.token_ids:
                    found.append((num_tokens, len(span.token_ids), int(span.is_trainable)))
                    tokens.write(np.asarray(span.token_ids, dtype=np.int32).tobytes())
                    num_tokens += len(span.token_ids)
            start = np.array([s for s, _, _ in found], dtype=np.int64)
            runs.write(_runs(start, found).tobytes())
            bits = int(np.float64(t.weight).view(np.int64))
            rows.write(np.array([num_runs, len(found), t.num_targets, bits], dtype=np.int64).tobytes())
            num_runs, count = num_runs + len(found), count + 1
    return count


def _runs(start: np.ndarray, found: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """(runs, 4) low and high half of the start, length, flag: starts may pass 2^31."""
    out = np.empty((len(found), 4), dtype=np.int32)
    out[:, 0], out[:, 1] = (start & 0x7FFFFFFF), (start >> 31)
    out[:, 2], out[:, 3] = [n for _, n, _ in found], [flag for _, _, flag in found]
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
