"""Rounds: a chunk is there whole or not at all, and comes back equal."""

import errno
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from data_samples import drawn

from tutelage.data import files
from tutelage.data.files import DiskError
from tutelage.data.rounds import RoundStore
from tutelage.data.store import TrajectoryStore
from tutelage.errors import DataError
from tutelage.types import Draw, Group, Task


def test_chunks_come_back_equal_and_in_order(tmp_path):
    store = RoundStore(tmp_path / "r")
    assert (store.load(0), store.committed()) == (None, ())
    store.commit(2, [drawn(4)])
    store.commit(0, [drawn(0), drawn(1)])
    store.commit(1, [])
    again = RoundStore(tmp_path / "r")
    assert again.committed() == (0, 1, 2)
    assert (again.load(0), again.load(1), again.load(2), again.load(3)) == ([drawn(0), drawn(1)], [], [drawn(4)], None)
    assert list(again) == [drawn(0), drawn(1), drawn(4)]


def test_a_chunk_is_committed_once(tmp_path):
    store = RoundStore(tmp_path / "r")
    store.commit(0, [drawn(99)])
    before = (tmp_path / "r" / "chunk-000000.parquet").stat().st_mtime_ns
    store.commit(0, [drawn(99)])  # a nan equals itself here
    assert (tmp_path / "r" / "chunk-000000.parquet").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"chunk-000000.parquet is already committed with other trajectories"):
        store.commit(0, [drawn(1)])
    with pytest.raises(DataError, match="numbered from 0, got -1"):
        store.commit(-1, [])


def test_finalise_makes_it_a_store(tmp_path):
    store = RoundStore(tmp_path / "r")
    store.commit(0, [drawn(0)])
    with pytest.raises(DataError, match=r"needs chunks 0 to 2; missing \[1, 2\], surplus \[\]"):
        store.finalise(3)
    with pytest.raises(DataError, match=r"surplus \[0\]"):
        store.finalise(0)
    store.commit(1, [drawn(1), drawn(2)])
    done = store.finalise(2)
    assert (len(done), list(done), done.verify()) == (3, [drawn(0), drawn(1), drawn(2)], [])
    manifest = (tmp_path / "r" / "manifest.json").read_bytes()
    assert len(store.finalise(2)) == 3
    assert (tmp_path / "r" / "manifest.json").read_bytes() == manifest


def test_a_damaged_chunk_is_named(tmp_path):
    store = RoundStore(tmp_path / "r")
    store.commit(0, [drawn(0)])
    path = tmp_path / "r" / "chunk-000000.parquet"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"chunk-000000.parquet is damaged.*Delete .*chunk-000000.parquet and resume"):
        store.load(0)


KILL = """
    import os, sys
    sys.path.insert(0, {here!r})
    from data_samples import drawn
    from tutelage.data import files
    from tutelage.data.rounds import RoundStore
    from tutelage.data.rows import encode, to_row
    encode(to_row(drawn(0)))  # whatever is imported late is imported before the processes part
    for when in ("fsync", "replace", "after"):
        child = os.fork()
        if child == 0:
            if when == "after":
                files.sync_folder = lambda *_: os._exit(9)
            else:
                setattr(files.os, when, lambda *_: os._exit(9))
            RoundStore({path!r} + "/" + when).commit(1, [drawn(1)])
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
"""


def test_killed_at_any_instant_a_chunk_is_whole_or_absent(tmp_path, request):
    expected = {"fsync": False, "replace": False, "after": True}
    for when in expected:
        RoundStore(tmp_path / when).commit(0, [drawn(0)])
    code = textwrap.dedent(KILL).format(path=str(tmp_path), here=str(request.path.parent))
    subprocess.run([sys.executable, "-c", code], check=True)
    for when, is_there in expected.items():
        assert len(list((tmp_path / when).glob(".*.tmp"))) == (0 if is_there else 1)
        resumed = RoundStore(tmp_path / when)
        assert list((tmp_path / when).glob(".*.tmp")) == []
        assert resumed.load(0) == [drawn(0)]
        assert resumed.load(1) == ([drawn(1)] if is_there else None)
        resumed.commit(1, [drawn(1)])
        assert list(resumed.finalise(2)) == [drawn(0), drawn(1)]


def test_leftovers_of_living_writers_are_left_alone(tmp_path):
    RoundStore(tmp_path / "r")
    other = tmp_path / "r" / f".chunk-000007.parquet@{files.socket.gethostname()}:{os.getppid()}.tmp"
    foreign = tmp_path / "r" / ".chunk-000008.parquet@elsewhere:1.tmp"
    other.touch()
    foreign.touch()
    store = RoundStore(tmp_path / "r")
    assert other.exists() and foreign.exists()
    assert store.committed() == ()
    store.finalise(0)
    assert not other.exists() and not foreign.exists()


def test_a_full_disk_leaves_no_part_of_a_chunk(tmp_path, monkeypatch):
    store = RoundStore(tmp_path / "r")
    store.commit(0, [drawn(0)])

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiskError, match=r"chunk-000001.parquet could not be written: No space.*1 chunks committed"):
        store.commit(1, [drawn(1)])
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["chunk-000000.parquet"]
    assert store.load(1) is None


def test_publish_collects_rounds_and_replaces_a_round_published_twice(tmp_path):
    task = Task(id="q", messages=({"role": "user", "content": "?"},))

    def draw(*numbers):
        return Draw(groups=(Group(task=task, trajectories=tuple(drawn(i) for i in numbers)),))

    RoundStore.publish(tmp_path / "s", "stage0-round00000", draw(0, 1))
    RoundStore.publish(tmp_path / "s", "stage0-round00001", draw(2))
    shard = RoundStore.publish(tmp_path / "s", "stage0-round00000", draw(0, 1))
    assert (shard.name, shard.rows) == ("stage0-round00000.parquet", 2)
    store = TrajectoryStore(tmp_path / "s")
    assert (list(store), store.verify()) == ([drawn(0), drawn(1), drawn(2)], [])
    RoundStore.publish(tmp_path / "s", "stage0-round00001", draw(3, 4))
    assert [t.id for t in TrajectoryStore(tmp_path / "s")] == ["t0", "t1", "t3", "t4"]


def test_published_copies_are_flagged_and_chunks_are_not(tmp_path):
    leaky = replace(drawn(0), completion="AKIA" + "ABCDEFGHIJKLMNOP")
    store = RoundStore(tmp_path / "r")
    store.commit(0, [leaky])
    assert store.load(0) == [leaky]
    RoundStore.publish(tmp_path / "s", "r", [leaky])
    (published,) = TrajectoryStore(tmp_path / "s")
    assert published == replace(leaky, extra={**leaky.extra, "secrets": {"aws_access_key_id": 1}})
