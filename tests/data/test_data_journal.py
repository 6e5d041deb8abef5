"""The journal: nothing appended is lost or doubled, whenever its writer dies."""

import errno
import json
import subprocess
import sys
import textwrap

import pytest
from data_samples import simple

from tutelage.data import files, journal
from tutelage.data.files import DiskError
from tutelage.data.journal import Journal
from tutelage.data.store import TrajectoryStore
from tutelage.errors import DataError


def ids(trajectories):
    return [t.id for t in trajectories]


def quarantined(folder):
    path = folder / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_append_read_and_compact(tmp_path):
    with Journal(tmp_path) as j:
        for i in range(5):
            j.append(simple(i))
        assert list(j.read()) == [simple(i) for i in range(5)]
        assert j.compact(rows_per_shard=2) == 5
        assert (list(j.read()), j.compact()) == ([], 0)
        j.append(simple(5))
        assert j.compact() == 1
    store = TrajectoryStore(tmp_path)
    assert list(store) == [simple(i) for i in range(6)]
    assert [s.name for s in store.shards] == [
        *(f"journal-000000-{k:03d}.parquet" for k in range(3)),
        "journal-000001-000.parquet",
    ]
    assert store.verify() == []
    assert [p.name for p in tmp_path.glob("*.jsonl")] == ["journal.jsonl"]


def test_a_new_writer_goes_on_where_the_last_stopped(tmp_path):
    for i in range(3):
        with Journal(tmp_path, is_synced=False) as j:
            j.append(simple(i))
    with Journal(tmp_path) as j:
        assert ids(j.read()) == ["t0", "t1", "t2"]
        with pytest.raises(DataError, match="is being written by another writer"):
            Journal(tmp_path)
    with pytest.raises(DataError, match="is closed"):
        j.append(simple(9))
    with pytest.raises(DataError, match="is closed"):
        j.compact()


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_last_line_is_quarantined_unless_it_is_whole(tmp_path, cut):
    with Journal(tmp_path) as j:
        j.append(simple(0))
        j.append(simple(1))
    raw = j.path.read_bytes()
    j.path.write_bytes(raw[:-cut])
    with Journal(tmp_path) as j:
        j.append(simple(2))
        assert ids(j.read()) == (["t0", "t1", "t2"] if cut == 1 else ["t0", "t2"])
    found = quarantined(tmp_path)
    if cut == 1:
        assert found == []
    else:
        (entry,) = found
        assert (entry["file"], entry["line"], entry["reason"]) == (
            "journal.jsonl",
            2,
            "torn: its writer died within it",
        )
        assert entry["raw"].encode() == raw.splitlines(keepends=True)[1][:-cut]  # all of it, however long


def test_a_bad_line_in_the_middle_is_quarantined_and_the_rest_compacts(tmp_path):
    with Journal(tmp_path) as j:
        j.append(simple(0))
    with open(j.path, "ab") as file:
        file.write(b'{"id": 3}\n\xff\xfe\nnull\n')
    with Journal(tmp_path) as j:
        j.append(simple(1))
        assert j.compact() == 2
    assert ids(TrajectoryStore(tmp_path)) == ["t0", "t1"]
    assert [e["line"] for e in quarantined(tmp_path)] == [2, 3, 4]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    real = journal.os.write

    def full(handle, data):
        real(handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(tmp_path) as j:
        j.append(simple(0))
        monkeypatch.setattr(journal.os, "write", full)
        with pytest.raises(DiskError, match=r"journal.jsonl could not be written: No space left.*before trajectory t1"):
            j.append(simple(1))
        monkeypatch.undo()
        j.append(simple(2))
        assert ids(j.read()) == ["t0", "t2"]
    assert quarantined(tmp_path) == []


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = journal.os.write
    monkeypatch.setattr(journal.os, "write", lambda handle, data: real(handle, data[:100]))
    with Journal(tmp_path) as j:
        j.append(simple(0))
        monkeypatch.undo()
        assert list(j.read()) == [simple(0)]


def test_a_compaction_that_fails_starts_again(tmp_path, monkeypatch):
    with Journal(tmp_path) as j:
        for i in range(3):
            j.append(simple(i))

        def full(source, target):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files.os, "replace", full)
        with pytest.raises(DiskError, match=r"still in journal-000000.jsonl"):
            j.compact()
        monkeypatch.undo()
        j.append(simple(3))
        assert ids(j.read()) == ["t0", "t1", "t2", "t3"]
        assert j.compact() == 4
    assert ids(TrajectoryStore(tmp_path)) == ["t0", "t1", "t2", "t3"]


def test_what_cannot_be_stored_never_enters(tmp_path):
    with Journal(tmp_path) as j:
        with pytest.raises(DataError, match="completion does not fit its column"):
            j.append(simple(0, completion=5))
        assert j.path.stat().st_size == 0


KILL = """
    import os, sys
    sys.path.insert(0, {here!r})
    from data_samples import simple
    from tutelage.data import files, journal, store
    from tutelage.data.journal import Journal
    dead = lambda *_, **__: os._exit(9)
    from tutelage.data.rows import encode, to_row
    encode(to_row(simple(0)))  # whatever is imported late is imported before the processes part
    for when in ("turned", "shard", "manifest", "unlink"):
        child = os.fork()
        if child == 0:
            j = Journal({path!r} + "/" + when)
            for i in range(4):
                j.append(simple(i))
            if when == "turned":
                journal.sync_folder = dead
            if when == "shard":
                real = journal.write_shard
                journal.write_shard = lambda p, *a, **k: dead() if "001" in p.name else real(p, *a, **k)
            if when == "manifest":
                journal.Manifest.save = dead
            if when == "unlink":
                journal.Path.unlink = dead
            j.compact(rows_per_shard=2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
"""


def test_killed_while_compacting_nothing_is_lost_or_doubled(tmp_path, request):
    code = textwrap.dedent(KILL).format(path=str(tmp_path), here=str(request.path.parent))
    subprocess.run([sys.executable, "-c", code], check=True)
    for when in ("turned", "shard", "manifest", "unlink"):
        with Journal(tmp_path / when) as j:
            j.append(simple(4))
            j.compact(rows_per_shard=2)
        store = TrajectoryStore(tmp_path / when)
        assert (when, ids(store), store.verify()) == (when, [f"t{i}" for i in range(5)], [])
        assert [p.name for p in (tmp_path / when).glob("*.jsonl")] == ["journal.jsonl"]
