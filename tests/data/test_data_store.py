"""The store gives back exactly what was put in, and says by name what it cannot read."""

import errno
import json
import math
import random
import struct
import subprocess
import sys
import textwrap

import pyarrow.parquet as pq
import pytest
from data_samples import simple
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.data import files
from tutelage.data.files import DiskError
from tutelage.data.rows import SCHEMA, decode, encode, from_row, to_row
from tutelage.data.store import Manifest, TrajectoryStore, TrajectoryWriter
from tutelage.errors import ConfigError, DataError
from tutelage.types import SamplingParams, Span, Status, Trajectory, Verdict

TEXT = st.text(st.characters(exclude_categories=()), max_size=6)  # lone surrogates and NUL included
FLOAT = st.floats(width=64)


@st.composite
def spans(draw):
    ids = tuple(draw(st.lists(st.integers(0, 2**31 - 1), max_size=4)))
    values = st.none() | st.tuples(*[FLOAT] * len(ids))
    is_sampled = draw(st.booleans())
    stop = st.lists(TEXT, max_size=2).map(tuple)
    return Span(
        token_ids=ids,
        role=draw(st.sampled_from(["system", "user", "assistant", "tool", "template", "odd"])),
        author=draw(TEXT),
        is_sampled=is_sampled,
        is_trainable=is_sampled and draw(st.booleans()),
        logprobs=draw(values),
        entropies=draw(values),
        policy_version=draw(st.none() | TEXT),
        sampling=draw(
            st.none() | st.builds(SamplingParams, temperature=st.floats(0, 2), top_p=st.floats(0, 1), stop=stop)
        ),
        is_context_exact=draw(st.booleans()),
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=5,
)
VERDICTS = st.none() | st.builds(
    Verdict,
    status=st.sampled_from(Status),
    score=st.none() | st.floats(0, 1),
    reason=TEXT,
    verifier=TEXT,
    version=TEXT,
    key=st.none() | TEXT,
)
TRAJECTORIES = st.builds(
    Trajectory,
    id=TEXT,
    task_id=TEXT,
    task_hash=TEXT,
    spans=st.lists(spans(), max_size=4).map(tuple),
    messages=st.lists(st.dictionaries(TEXT, JSON, max_size=2), max_size=2).map(tuple),
    completion=TEXT,
    task_name=TEXT,
    prompt_index=st.integers(0, 2**40),
    sample_index=st.integers(0, 9),
    finish=TEXT,
    verdict=VERDICTS,
    weight=st.floats(allow_nan=False),
    marks=st.lists(TEXT, max_size=2).map(tuple),
    parent=st.none() | TEXT,
    tokenizer=TEXT,
    origin=TEXT,
    licence=TEXT,
    extra=st.dictionaries(TEXT, JSON, max_size=2),
)


def bits(t: Trajectory) -> str:
    """Text that differs where any field differs, by a sign of zero, a type or a nan's presence."""

    def exact(value):
        if isinstance(value, float):
            return "nan" if math.isnan(value) else struct.pack("<d", value).hex()
        return repr(value)

    numbers = [[exact(x) for x in (v or ())] for s in t.spans for v in (s.logprobs, s.entropies)]
    return repr((t, numbers, exact(t.weight)))


def write(path, n=10, **kwargs):
    trajectories = [simple(i) for i in range(n)]
    with TrajectoryWriter(path, **kwargs) as writer:
        writer.write_all(trajectories)
    return trajectories


@given(batch=st.lists(TRAJECTORIES, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_trajectory_comes_back_to_the_bit(batch):
    for t in batch:
        (arrow,) = decode(encode(to_row(t)))
        assert bits(arrow) == bits(t)
        assert bits(from_row(json.loads(json.dumps(to_row(t))))) == bits(t)


def test_round_trip_over_several_shards_and_writers(tmp_path):
    first = write(tmp_path / "s", 10, rows_per_shard=4, metadata={"run": "a"})
    with TrajectoryWriter(tmp_path / "s") as writer:
        writer.write(simple(99))
    store = TrajectoryStore(tmp_path / "s")
    assert [bits(t) for t in store] == [bits(t) for t in [*first, simple(99)]]
    assert [(s.name, s.rows) for s in store.shards] == [
        ("shard-000000.parquet", 4),
        ("shard-000001.parquet", 4),
        ("shard-000002.parquet", 2),
        ("shard-000003.parquet", 1),
    ]
    assert (len(store), store.verify(), dict(store.metadata)) == (11, [], {"run": "a"})
    assert [t.id for t in store.read(where=lambda row: row in (0, 5, 10), batch_rows=3)] == ["t0", "t5", "t99"]


def test_equal_input_gives_equal_files(tmp_path):
    write(tmp_path / "a", 5)
    write(tmp_path / "b", 5)
    assert TrajectoryStore(tmp_path / "a").shards == TrajectoryStore(tmp_path / "b").shards


def test_derived_columns_say_who_wrote_and_what_is_trained(tmp_path):
    write(tmp_path / "s", 3)
    (batch,) = TrajectoryStore(tmp_path / "s").scan(["id", "role_codes", "is_trainable", "author", "prompt_hash"])
    rows = batch.to_pylist()
    assert rows[2]["role_codes"] == [1, 1, 1, 2, 2, 2]
    assert rows[2]["is_trainable"] == [False] * 3 + [True] * 3
    assert rows[2]["author"] == "student"
    assert len({r["prompt_hash"] for r in rows}) == 3
    with pytest.raises(DataError, match="no column nonsense; it has id, task_id"):
        list(TrajectoryStore(tmp_path / "s").scan(["nonsense"]))


def test_other_libraries_read_it_as_it_is(tmp_path):
    write(tmp_path / "s", 6, rows_per_shard=4)
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(tmp_path / "s" / "*.parquet")
    assert frame["id"].to_list() == [f"t{i}" for i in range(6)]
    assert frame["logprobs"][3].to_list() == [None, None, None, -0.1 * 3, -1e-300, -0.0]
    assert json.loads(frame["messages"][1])[0]["content"] == "hé\ud800"
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "s" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["id"][:] == [f"t{i}" for i in range(6)]
    assert loaded[2]["token_ids"] == [1, 2, 2, 7, 8, 9]
    assert [s["length"] for s in loaded[2]["spans"]] == [3, 3]


def test_text_that_utf8_cannot_hold_is_kept_exactly(tmp_path):
    t = simple(0, completion="a\ud800", marks=("ok", "\udfff"), task_name="名")
    with TrajectoryWriter(tmp_path / "s") as writer:
        writer.write(t)
    assert list(TrajectoryStore(tmp_path / "s")) == [t]
    (row,) = pq.read_table(tmp_path / "s" / "shard-000000.parquet").to_pylist()
    assert (row["completion"], row["marks"], row["task_name"]) == ("a\ufffd", ["ok", "\ufffd"], "名")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": {"a": {1: 2}}}, "extra of trajectory t0.a has the key 1, a int"),
        ({"extra": {"f": print}}, "extra of trajectory t0.f is a builtin_function_or_method"),
        ({"messages": ({"role": "user", "content": b"x"},)}, r"messages of trajectory t0\[0\].content is a bytes"),
        ({"extra": {"n": 10**5000}}, "extra of trajectory t0 cannot be written as JSON: .*4300"),
        ({"spans": (Span(token_ids=(2**31,), role="user", author="user"),)}, "trajectory t0: token_ids does not fit"),
        ({"id": None}, "id may not be None"),
        ({"completion": 5}, "trajectory t0: completion does not fit its column"),
    ],
)
def test_what_cannot_be_stored_is_named_and_the_writer_goes_on(tmp_path, change, message):
    with TrajectoryWriter(tmp_path / "s") as writer:
        with pytest.raises(DataError, match=message):
            writer.write(simple(0, **change))
        writer.write(simple(1))
    assert [t.id for t in TrajectoryStore(tmp_path / "s")] == ["t1"]


def test_tuples_come_back_as_lists_and_numpy_scalars_as_numbers():
    import numpy as np

    t = simple(0, extra={"pair": (1, 2), "x": np.float32(0.5)})
    assert decode(encode(to_row(t)))[0].extra == {"pair": [1, 2], "x": 0.5}


# -- damage --------------------------------------------------------------------------------------


def damaged_store(tmp_path, damage):
    write(tmp_path / "s", 9, rows_per_shard=3)
    damage(tmp_path / "s" / "shard-000001.parquet")
    return TrajectoryStore(tmp_path / "s")


def flip(path):
    """Change one byte inside the first column's data."""
    raw = bytearray(path.read_bytes())
    raw[60] ^= 0xFF
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("damage", "verified"),
    [
        (lambda p: p.unlink(), "is named by the manifest and missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "bytes, the manifest says"),
        (lambda p: p.write_bytes(b""), "damaged: 0 bytes"),
        (flip, "SHA-256"),
    ],
)
def test_a_damaged_shard_is_named_and_the_rest_is_readable(tmp_path, damage, verified):
    store = damaged_store(tmp_path, damage)
    with pytest.raises(DataError, match="shard-000001"):
        list(store)
    assert [t.id for t in store.read(on_bad_shard="skip")] == ["t0", "t1", "t2", "t6", "t7", "t8"]
    assert len(store.problems) == 1 and "shard-000001.parquet" in store.problems[0]
    wanted = {3: "t3", 7: "t7"}
    assert [t.id for t in store.read(where=wanted.__contains__, on_bad_shard="skip")] == ["t7"]
    (problem,) = store.verify()
    assert "shard-000001.parquet" in problem and verified in problem


def test_no_changed_byte_changes_a_trajectory_unseen(tmp_path):
    noise = random.Random(0)
    spans = (Span(token_ids=(1,) * 60, role="user", author="u", logprobs=tuple(-noise.random() for _ in range(60))),)
    t = simple(0, spans=spans)
    with TrajectoryWriter(tmp_path / "s") as writer:
        writer.write(t)
    store = TrajectoryStore(tmp_path / "s")
    path = tmp_path / "s" / store.shards[0].name
    raw, changed, seen = path.read_bytes(), [], 0
    for at in range(0, len(raw), 97):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        try:
            changed += [] if list(store) == [t] else [at]
        except DataError as error:
            seen += store.shards[0].name in str(error)
    assert (changed, seen) == ([], len(range(0, len(raw), 97)))
    path.write_bytes(raw)
    assert list(store) == [t]


def test_a_scan_of_columns_sees_their_changed_pages(tmp_path):
    noise = random.Random(0)
    spans = (Span(token_ids=(1,) * 99, role="user", author="u", entropies=tuple(noise.random() for _ in range(99))),)
    with TrajectoryWriter(tmp_path / "s") as writer:
        writer.write(simple(0, spans=spans))
    store = TrajectoryStore(tmp_path / "s")
    path = tmp_path / "s" / store.shards[0].name
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        (column,) = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith("entropies")]
    raw = path.read_bytes()
    end = column.data_page_offset + column.total_compressed_size
    begin = column.dictionary_page_offset or column.data_page_offset
    for at in range(begin + 100, begin + 500, 40):  # within the values, behind the page's header
        assert at < end
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        assert len(list(store.scan(["id"]))) == 1
        with pytest.raises(DataError, match="is damaged"):
            list(store.scan(["entropies"]))


def test_another_shard_in_a_shards_place_is_seen(tmp_path):
    write(tmp_path / "s", 9, rows_per_shard=3)
    write(tmp_path / "two", 2)
    (tmp_path / "s" / "shard-000001.parquet").write_bytes((tmp_path / "two" / "shard-000000.parquet").read_bytes())
    with pytest.raises(DataError, match=r"shard-000001.parquet is damaged: \d+ bytes, the manifest says \d+"):
        list(TrajectoryStore(tmp_path / "s"))


def test_a_shard_the_manifest_does_not_name_is_reported_and_not_read(tmp_path):
    write(tmp_path / "s", 3)
    write(tmp_path / "other", 2)
    (tmp_path / "other" / "shard-000000.parquet").rename(tmp_path / "s" / "shard-000001.parquet")
    store = TrajectoryStore(tmp_path / "s")
    assert len(list(store)) == 3
    (problem,) = store.verify()
    assert "shard-000001.parquet: not named by the manifest" in problem
    with TrajectoryWriter(tmp_path / "s") as writer:  # and it is not written over
        writer.write(simple(7))
    assert [s.name for s in TrajectoryStore(tmp_path / "s").shards] == ["shard-000000.parquet", "shard-000002.parquet"]


def test_no_store_no_manifest_bad_manifest_later_version(tmp_path):
    (tmp_path / "trajectories").mkdir()
    with pytest.raises(DataError, match=r"trajectorie.*does not exist.*it holds trajectories"):
        TrajectoryStore(tmp_path / "trajectorie")
    with pytest.raises(DataError, match=r"has no manifest.json.*it holds nothing"):
        TrajectoryStore(tmp_path / "trajectories")
    write(tmp_path / "s", 1)
    path = tmp_path / "s" / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "schema_version": 99}))
    with pytest.raises(DataError, match=r"schema version 99.*up to schema version 1"):
        TrajectoryStore(tmp_path / "s")
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest.json must be the manifest .* cannot be read"):
        TrajectoryStore(tmp_path / "s")


# -- writers that die, or may not write -------------------------------------------------------------


def test_an_exception_in_the_block_keeps_what_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), TrajectoryWriter(tmp_path / "s", rows_per_shard=4) as writer:
        writer.write_all(simple(i) for i in range(6))
        raise KeyboardInterrupt
    assert len(list(TrajectoryStore(tmp_path / "s"))) == 6


KILLED = """
    import os, sys
    sys.path.insert(0, {here!r})
    from data_samples import simple
    from tutelage.data.store import TrajectoryWriter
    writer = TrajectoryWriter({path!r}, rows_per_shard=3)
    for i in range(8):
        writer.write(simple(i))
    os._exit(9)
"""


def test_a_killed_writer_leaves_whole_shards_and_its_leftovers_are_cleaned(tmp_path, request):
    code = textwrap.dedent(KILLED).format(path=str(tmp_path / "s"), here=str(request.path.parent))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    store = TrajectoryStore(tmp_path / "s")
    assert ([t.id for t in store], store.verify()) == ([f"t{i}" for i in range(6)], [])
    assert len(list((tmp_path / "s").glob(".*.tmp"))) == 1
    with TrajectoryWriter(tmp_path / "s") as writer:
        writer.write(simple(6))
    assert len(list(TrajectoryStore(tmp_path / "s"))) == 7
    assert list((tmp_path / "s").glob(".*.tmp")) == []


def test_two_writers_do_not_share_a_folder(tmp_path):
    with TrajectoryWriter(tmp_path / "s"), pytest.raises(DataError, match="is being written by another writer"):
        TrajectoryWriter(tmp_path / "s")
    with pytest.raises(DataError, match="is closed"):
        writer = TrajectoryWriter(tmp_path / "s")
        writer.close()
        writer.write(simple(0))
    with pytest.raises(ConfigError, match="rows_per_shard must be at least 1, got 0"):
        TrajectoryWriter(tmp_path / "s", rows_per_shard=0)


@pytest.mark.parametrize("when", ["shard", "manifest"])
def test_a_full_disk_is_said_and_earlier_shards_stay(tmp_path, monkeypatch, when):
    write(tmp_path / "s", 4, rows_per_shard=2)
    before = sorted(p.name for p in (tmp_path / "s").iterdir())
    real = files.os.replace

    def full(source, target):
        if (when == "manifest") == str(target).endswith("manifest.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(DiskError, match=r"No space left on device.*intact.*Free some space") as caught:
        write(tmp_path / "s", 4, rows_per_shard=2)
    assert isinstance(caught.value, OSError) and caught.value.exit_code == 1
    monkeypatch.undo()
    assert len(list(TrajectoryStore(tmp_path / "s"))) == 4
    left = sorted(p.name for p in (tmp_path / "s").iterdir())
    assert left == (before if when == "shard" else sorted([*before, "shard-000002.parquet"]))
    write(tmp_path / "s", 1)
    assert len(list(TrajectoryStore(tmp_path / "s"))) == 5


FULL = """
    import resource, sys
    sys.path.insert(0, {here!r})
    from data_samples import simple
    from tutelage.data.store import TrajectoryWriter
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    noise = __import__("random").Random(0)
    with TrajectoryWriter({path!r}, rows_per_shard=2) as writer:
        for i in range(3):
            size = 10 if i < 2 else 200_000
            writer.write(simple(i, completion=noise.randbytes(size).hex()))
"""


def test_a_file_that_may_not_grow_is_said_and_earlier_shards_stay(tmp_path, request):
    code = textwrap.dedent(FULL).format(path=str(tmp_path / "s"), here=str(request.path.parent))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "DiskError" in done.stderr and "shard-000001.parquet could not be written: File too large" in done.stderr
    assert "The 1 shards before it (2 trajectories) are intact" in done.stderr
    store = TrajectoryStore(tmp_path / "s")
    assert ([t.id for t in store], store.verify()) == (["t0", "t1"], [])
    assert list((tmp_path / "s").glob(".*.tmp")) == []


def test_memory_is_bounded_by_row_groups(tmp_path):
    with TrajectoryWriter(tmp_path / "s") as writer:
        for i in range(1200):
            writer.write(simple(i))
    with pq.ParquetFile(tmp_path / "s" / "shard-000000.parquet") as file:
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [512, 512, 176]
        assert file.schema_arrow.names == SCHEMA.names
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_manifest_survives_as_it_is(tmp_path):
    write(tmp_path / "s", 2)
    manifest = Manifest.load(tmp_path / "s")
    manifest.save(tmp_path / "s")
    assert Manifest.load(tmp_path / "s") == manifest
