"""Trajectories on disk by number: what comes back, in any order, and what is refused."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.store import TrajectoryStore, TrajectoryWriter
from tutelage.data.token_file import DONE, NAMES, TokenFile, _runs, rows_of_store, rows_of_trajectories
from tutelage.data.token_file import write_token_file as write_rows
from tutelage.errors import DataError
from tutelage.types import Span, Trajectory


def write_token_file(folder: Path, ts: Iterable[Trajectory]) -> TokenFile:
    return write_rows(folder, rows_of_trajectories(ts))


def made(name: str, lengths: list[tuple[int, bool]], weight: float = 1.0) -> Trajectory:
    spans, token = [], 7 * len(name)
    for n, trained in lengths:
        ids = tuple(range(token, token + n))
        spans.append(Span(token_ids=ids, role="x", author="student", is_sampled=trained, is_trainable=trained))
        token += n
    return Trajectory(id=name, task_id=name, task_hash=name, spans=tuple(spans), weight=weight, completion="text")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=4),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
        max_size=6,
    )
)
def test_tokens_targets_and_weights_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    folder = tmp_path_factory.mktemp("tokens") / "file"
    ts = [made(f"t{i}", lengths, weight) for i, (lengths, weight) in enumerate(rows)]
    file = write_token_file(folder, iter(ts))
    assert len(file) == len(ts)
    for i in reversed(range(len(ts))):
        got = file[i]
        assert got.token_ids == ts[i].token_ids and got.is_target == ts[i].is_target
        assert got.num_targets == ts[i].num_targets == file.num_targets[i]
        assert got.weight == ts[i].weight == file.weights[i]
    assert [t.token_ids for t in file] == [t.token_ids for t in ts]


def test_a_file_is_written_once_and_one_that_was_not_finished_is_written_again(tmp_path: Path) -> None:
    ts = [made("a", [(2, False), (3, True)]), made("bb", [(1, False), (2, True)], 0.5)]
    write_token_file(tmp_path / "f", ts)
    again = write_token_file(tmp_path / "f", iter([]))
    assert len(again) == 2 and again[1].weight == 0.5
    (tmp_path / "f" / DONE).unlink()
    with pytest.raises(DataError, match="finished token file"):
        TokenFile(tmp_path / "f")
    assert len(write_token_file(tmp_path / "f", ts[:1])) == 1


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    write_token_file(tmp_path, [made("a", [(2, False), (3, True)])])
    (tmp_path / DONE).write_text(json.dumps({"rows": 2}))
    with pytest.raises(DataError, match="2 rows were written"):
        TokenFile(tmp_path)
    (tmp_path / DONE).write_text(json.dumps({"rows": 1}))
    np.fromfile(tmp_path / NAMES[1], dtype=np.int32)[:4].tofile(tmp_path / NAMES[1])
    with pytest.raises(DataError, match="1 runs"):
        TokenFile(tmp_path)


def test_places_beyond_two_gibitokens_are_kept() -> None:
    flags = np.array([0, 0, 1, 1, 1, 0], dtype=bool)
    for base in (5, 2**31 + 3, 2**40 + 1):
        runs = _runs(base, np.array([0, 2, 5]), flags).astype(np.int64)
        assert (runs[:, 0] + (runs[:, 1] << 31)).tolist() == [base, base + 2, base + 5]
        assert runs[:, 2:].tolist() == [[2, 0], [3, 1], [1, 0]]


def test_a_store_is_read_by_columns_to_the_same_rows(tmp_path: Path) -> None:
    ts = [made(f"t{i}", [(i % 3, False), (1 + i % 4, i % 5 > 0), (2, False), (1, True)], 1 + i / 7) for i in range(40)]
    ts.append(made("none", [(3, False)]))
    with TrajectoryWriter(tmp_path / "store", rows_per_shard=7) as writer:
        writer.write_all(ts)
    is_kept = np.array([i % 3 != 1 for i in range(len(ts))])
    is_kept[-1] = True
    file = write_rows(tmp_path / "a", rows_of_store(TrajectoryStore(tmp_path / "store"), is_kept))
    other = write_token_file(tmp_path / "b", [t for t, keep in zip(ts, is_kept, strict=True) if keep and t.num_targets])
    assert len(file) == len(other) == is_kept.sum() - 1
    for a, b in zip(file, other, strict=True):
        assert (a.token_ids, a.is_target, a.weight) == (b.token_ids, b.is_target, b.weight)
