"""Collation: every target keeps its context, its id and its columns, whatever the layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.collate import Batch, collate, input_length
from tutelage.errors import DataError
from tutelage.types import Span, TargetRow, Trajectory

LAYOUTS = [("packed", "right"), ("padded", "right"), ("padded", "left")]


def span(ids, trainable, sampled=True):
    return Span(
        token_ids=tuple(ids),
        role="assistant" if trainable else "user",
        author="student" if trainable else "user",
        is_sampled=trainable and sampled,
        is_trainable=trainable,
    )


def row(spans, weights, id="t", **columns):
    t = Trajectory(id=id, task_id="q", task_hash="h", spans=tuple(span(i, tr) for i, tr in spans))
    return TargetRow(trajectory=t, columns={"weight_C": weights, **columns}, count=1.0)


def literal_targets(rows):
    """(row, target) -> (tokens before it, its id, its weight, its place in column x), by walking the spans."""
    out = {}
    for r, given_row in enumerate(rows):
        before, nth = [], 0
        for s in given_row.trajectory.spans:
            for token in s.token_ids:
                if s.is_trainable and before:
                    weight = given_row.columns["weight_C"][nth]
                    if weight != 0:
                        out[r, nth] = (tuple(before), token, weight, given_row.columns["x_C"][nth])
                    nth += 1
                before.append(token)
    return out


def targets_of(batch: Batch):
    """The same mapping read back from a batch: the context is the document's tokens up to the position."""
    T = batch.token_ids_BT.shape[1]
    flat, positions = batch.token_ids_BT.flatten().tolist(), batch.position_ids_BT.flatten().tolist()
    out = {}
    for n, p in enumerate(batch.target_positions_N.tolist()):
        start = p - positions[p]
        assert start // T == p // T, "the context of a target crosses into another row"
        assert positions[start : p + 1] == list(range(p - start + 1))
        if batch.attention_mask_BT is not None:
            mask = batch.attention_mask_BT.flatten().tolist()
            assert mask[start : p + 1] == [1] * (p - start + 1)
            assert all(m == 0 for m in mask[(p // T) * T : start]), "tokens before the document can be attended to"
        c = {k: v[n].item() for k, v in batch.columns.items()}
        key = (c["row_index_C"], c["target_index_C"])
        assert key not in out
        out[key] = (tuple(flat[start : p + 1]), c["target_ids_C"], c["weight_C"], c["x_C"])
    return out


@st.composite
def target_rows(draw):
    spans = draw(st.lists(st.tuples(st.lists(st.integers(1, 30), max_size=5), st.booleans()), min_size=1, max_size=5))
    t = Trajectory(id="t", task_id="q", task_hash="h", spans=tuple(span(i, tr) for i, tr in spans))
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=sum(t.is_target), max_size=sum(t.is_target)))
    x = draw(st.lists(st.floats(-9, 9), min_size=sum(t.is_target), max_size=sum(t.is_target)))
    return TargetRow(trajectory=t, columns={"weight_C": weights, "x_C": x}, count=1.0)


@given(rows=st.lists(target_rows(), max_size=6), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=120, deadline=None)
def test_every_target_keeps_its_context_id_and_columns(rows, layout):
    batch = collate(rows, layout=layout[0], side=layout[1], pad_id=0, dtype=torch.float64)
    expected = literal_targets(rows)
    got = targets_of(batch) if rows else {}
    assert got == expected
    assert batch.num_targets == len(expected)
    trained = tuple(i for i, r in enumerate(rows) if any(w != 0 for w in r.columns["weight_C"]))
    assert batch.rows == trained
    assert batch.num_tokens == sum(input_length(r) for r in rows)
    # What is computed ends with what the last selected target needs.
    longest = {i: max(len(ctx) for (r, _), (ctx, *_) in expected.items() if r == i) for i in trained}
    assert {i: input_length(rows[i]) for i in trained} == longest
    assert batch.max_seqlen == max(longest.values(), default=1)


@given(rows=st.lists(target_rows(), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_layouts_hold_the_same_targets_in_the_same_order(rows):
    batches = [collate(rows, layout=la, side=s) for la, s in LAYOUTS]
    for other in batches[1:]:
        for name, column in batches[0].columns.items():
            assert torch.equal(column, other.columns[name]), name
    packed = batches[0]
    assert packed.attention_mask_BT is None
    assert (packed.token_ids_BT.shape[0], batches[1].cu_seqlens) == (1, None)
    lengths = [n for r in rows if (n := input_length(r))] or [1]
    assert packed.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert packed.cu_seqlens.dtype == torch.int32
    starts = set(packed.cu_seqlens.tolist()[:-1])
    assert {i for i, p in enumerate(packed.position_ids_BT[0].tolist()) if p == 0} == starts


def test_exact_tensors_of_a_small_batch():
    rows = [
        row([([1, 2], False), ([3, 4], True), ([5], False)], [1.0, 2.0], x_C=[0.5, 0.25]),
        row([([6], False), ([7], True)], [0.0], x_C=[9.0]),
        row([([8], True), ([9], True), ([10], True)], [1.0, 0.0], x_C=[1.0, 2.0]),
    ]
    left = collate(rows, layout="padded", side="left", pad_id=99)
    assert left.token_ids_BT.tolist() == [[1, 2, 3], [99, 99, 8]]
    assert left.attention_mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.position_ids_BT.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert left.target_positions_N.tolist() == [1, 2, 5]
    assert left.columns["target_ids_C"].tolist() == [3, 4, 9]
    assert left.columns["row_index_C"].tolist() == left.row_index_C.tolist() == [0, 0, 2]
    assert left.columns["target_index_C"].tolist() == left.target_index_C.tolist() == [0, 1, 0]
    right = collate(rows, layout="padded", side="right", pad_id=99)
    assert right.token_ids_BT.tolist() == [[1, 2, 3], [8, 99, 99]]
    assert right.target_positions_N.tolist() == [1, 2, 3]
    packed = collate(rows)
    assert packed.token_ids_BT.tolist() == [[1, 2, 3, 8]]
    assert packed.position_ids_BT.tolist() == [[0, 1, 2, 0]]
    assert (packed.cu_seqlens.tolist(), packed.max_seqlen, packed.rows) == ([0, 3, 4], 3, (0, 2))


def test_column_kinds_and_further_axes():
    ids_CK = np.array([[1, 2], [3, 4]], dtype=np.int32)
    rows = [
        row(
            [([1], False), ([2, 3], True)],
            (1.0, 1.0),
            teacher_ids_CK=ids_CK,
            teacher_logprobs_CK=torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64),
            is_first_C=[True, False],
        )
    ]
    c = collate(rows, dtype=torch.float64).columns
    assert (c["teacher_ids_CK"].dtype, c["teacher_ids_CK"].tolist()) == (torch.int64, [[1, 2], [3, 4]])
    assert (c["is_first_C"].dtype, c["is_first_C"].tolist()) == (torch.bool, [True, False])
    assert c["teacher_logprobs_CK"].tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert collate(rows).columns["teacher_logprobs_CK"].dtype == torch.float32


def test_read_only_columns_are_accepted():
    weights = np.ones(1)
    weights.flags.writeable = False
    assert collate([row([([1], False), ([2], True)], weights)]).num_targets == 1


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_batch_without_targets_can_still_be_run(layout):
    nothing = row([([1], False), ([2], True)], [0.0], x_CK=np.zeros((1, 3)))
    for rows in ([], [nothing]):
        batch = collate(rows, layout=layout, pad_id=5)
        assert batch.token_ids_BT.tolist() == [[5]]
        assert (batch.num_targets, batch.num_tokens, batch.rows) == (0, 0, ())
    assert batch.columns["x_CK"].shape == (0, 3)


def test_with_columns_and_to():
    batch = collate([row([([1], False), ([2, 3], True)], [1.0, 1.0])], layout="padded")
    more = batch.with_columns({"teacher_C": torch.tensor([0.5, 0.25])}).to("cpu")
    assert more.columns["teacher_C"].tolist() == [0.5, 0.25]
    assert set(more.columns) == {*batch.columns, "teacher_C"}
    with pytest.raises(DataError, match=r"teacher_C .* 2 targets, got shape \(3,\)"):
        batch.with_columns({"teacher_C": torch.zeros(3)})
    moved = collate([row([([1], False), ([2, 3], True)], [1.0, 1.0])]).to("meta")
    tensors = [moved.token_ids_BT, moved.position_ids_BT, moved.cu_seqlens, moved.target_positions_N]
    assert all(t.device.type == "meta" for t in [*tensors, *moved.columns.values()])


OK = ([([1], False), ([2, 3], True)], [1.0, 1.0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(OK[0], [1.0], id="short")], r"row 0 \(short\): column weight_C .* \(2\), got 1"),
        ([row(*OK, x_C=[1.0])], r"column x_C needs one entry .* \(2\), got 1"),
        ([row(OK[0], [1.0, float("nan")])], r"weight_C\[1\] is nan"),
        ([row(OK[0], [float("inf"), 0.0])], r"weight_C\[0\] is inf"),
        ([row(*OK, x_C=[1.0, 2.0]), row(*OK, id="b")], r"row 0 .*'x_C'.* row 1 \(b\) has \['weight_C'\]"),
        ([row(*OK, x_CK=np.zeros((2, 3))), row(*OK, x_CK=np.zeros((2, 4)))], r"row 0 has \(3,\).*row 1 .*\(4,\)"),
        ([row(*OK, x_C=[1.0, 2.0]), row(*OK, x_C=[1, 2])], "row 0 has .*float32, row 1 .*int64"),
        ([row(*OK, x_C=["a", "b"])], "column x_C must be an array of numbers, got list"),
        ([row(*OK, x_C=[1.0, None])], "column x_C must be an array of numbers"),
        ([row(*OK, target_ids_C=[1, 2])], "target_ids_C is made by collate"),
    ],
)
def test_wrong_columns_are_named(rows, message):
    with pytest.raises(DataError, match=message):
        collate(rows)


def test_missing_weights_unknown_layout_and_side():
    bare = TargetRow(trajectory=row(*OK).trajectory, columns={"x_C": [1.0, 2.0]}, count=1.0)
    with pytest.raises(DataError, match=r"no column weight_C; it has \['x_C'\]"):
        collate([bare])
    with pytest.raises(DataError, match="got 'ragged'"):
        collate([row(*OK)], layout="ragged")
    with pytest.raises(DataError, match="got 'up'"):
        collate([row(*OK)], layout="padded", side="up")
