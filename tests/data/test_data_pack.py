"""Packing: everything in exactly one group, the budget holds, equal input gives equal groups."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data import microbatches, pack_padded, pack_tokens
from tutelage.data.collate import collate
from tutelage.errors import ConfigError
from tutelage.types import Span, TargetRow, Trajectory


@given(
    lengths=st.lists(st.integers(0, 40), max_size=40),
    budget=st.integers(1, 60),
    max_rows=st.none() | st.integers(1, 4),
    layout=st.sampled_from(["packed", "padded"]),
)
@settings(max_examples=300, deadline=None)
def test_groups_partition_the_step_within_the_budget(lengths, budget, max_rows, layout):
    pack = pack_tokens if layout == "packed" else pack_padded
    packing = pack(lengths, max_tokens=budget, max_rows=max_rows)
    assert sorted(i for g in packing.groups for i in g) == [i for i, n in enumerate(lengths) if n > 0]
    computed = []
    for group in packing.groups:
        inside = [lengths[i] for i in group]
        computed.append(sum(inside) if layout == "packed" else len(inside) * max(inside))
        assert computed[-1] <= budget or len(inside) == 1
        assert max_rows is None or len(inside) <= max_rows
        assert list(group) == sorted(group)
    assert [g[0] for g in packing.groups] == sorted(g[0] for g in packing.groups)
    assert (packing.num_tokens, packing.num_computed) == (sum(lengths), sum(computed))
    assert packing.max_computed == max(computed, default=0)
    assert packing.num_overlong == sum(n > budget for n in lengths)
    assert packing == pack(tuple(lengths), max_tokens=budget, max_rows=max_rows)
    if layout == "packed":
        assert packing.frac_real == 1.0
        if max_rows is None:
            # No two groups fit into one, so fewer than twice the fewest possible.
            assert all(a + b > budget for i, a in enumerate(computed) for b in computed[:i])


def test_known_packing():
    assert pack_tokens([4, 8, 1, 4, 2, 1], max_tokens=10).groups == ((0, 2, 3, 5), (1, 4))
    assert pack_tokens([50, 3, 3], max_tokens=10).groups == ((0,), (1, 2))
    padded = pack_padded([4, 8, 1, 4, 2, 1], max_tokens=10)
    assert padded.groups == ((0, 3), (1,), (2, 4, 5))
    assert (padded.num_tokens, padded.num_computed, padded.max_computed) == (20, 22, 8)
    assert padded.frac_real == 20 / 22
    assert pack_tokens([], max_tokens=5).frac_real == 1.0


def test_bucketing_pads_less_than_the_given_order():
    lengths = [5, 100] * 50
    assert pack_padded(lengths, max_tokens=400).frac_real > 0.9


def test_budget_must_be_positive():
    with pytest.raises(ConfigError, match="max_tokens_per_microbatch must be at least 1, got 0"):
        pack_tokens([1], max_tokens=0)
    with pytest.raises(ConfigError, match="max_rows must be at least 1 or None, got 0"):
        pack_padded([1], max_tokens=1, max_rows=0)


def test_microbatches_count_what_collate_makes():
    def row(n, weight):
        spans = (
            Span(token_ids=(1,) * n, role="user", author="user"),
            Span(token_ids=(2, 3), role="assistant", author="student", is_sampled=True, is_trainable=True),
        )
        t = Trajectory(id=str(n), task_id="q", task_hash="", spans=spans)
        return TargetRow(trajectory=t, columns={"weight_C": [weight, weight]}, count=2.0)

    rows = [row(3, 1.0), row(9, 1.0), row(5, 0.0), row(2, 1.0), row(4, 1.0)]
    lengths = [4, 10, 0, 3, 5]
    for layout, pack in (("packed", pack_tokens), ("padded", pack_padded)):
        packing = pack(lengths, max_tokens=12)
        parts = microbatches(rows, max_tokens=12, layout=layout)
        assert parts == [[rows[i] for i in group] for group in packing.groups]
        batches = [collate(part, layout=layout) for part in parts]
        assert sum(b.token_ids_BT.numel() for b in batches) == packing.num_computed
        assert max(b.token_ids_BT.numel() for b in batches) == packing.max_computed
        assert sum(b.num_tokens for b in batches) == packing.num_tokens == 22
        assert sum(b.num_targets for b in batches) == 8
    assert microbatches(["aaaa", "bb", "", "cc"], max_tokens=4, length=len) == [["aaaa"], ["bb", "cc"]]
