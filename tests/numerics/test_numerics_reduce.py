import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_oracles import quick

from tutelage import numerics
from tutelage.errors import NumericsError
from tutelage.testing import shapes_match_names

mean_over_tokens = shapes_match_names(numerics.mean_over_tokens)
weighted_sum = shapes_match_names(numerics.weighted_sum)


@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(lambda ns: sum(ns) > 0), st.integers(0, 2**31))
def test_step_gradient_does_not_depend_on_how_it_was_cut_into_microbatches(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, dtype=torch.float64, generator=g)
    x = torch.randn(len(lengths), 6, 3, dtype=torch.float64, generator=g)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    n = int(mask.sum())

    def grad(cuts, reduce):
        w = weight.clone().requires_grad_()
        for rows in cuts:
            reduce((x[rows] @ w) ** 2, mask[rows]).backward()
        return w.grad

    for reduce in (
        lambda loss, m: mean_over_tokens(loss, m, num_targets=n),
        lambda loss, m: weighted_sum(loss, m.double(), divisor=n),
    ):
        whole = grad([list(range(len(lengths)))], reduce)
        singles = grad([[i] for i in range(len(lengths))], reduce)
        torch.testing.assert_close(whole, singles, rtol=1e-12, atol=1e-14)


def test_mean_over_tokens_is_a_mean():
    loss = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_over_tokens(loss, mask, num_targets=3).item() == 3.0


def test_weighted_sum_weighs_and_divides():
    loss = torch.tensor([[1.0, 2.0], [6.0, 9.0]])
    weight = torch.tensor([[1.0, 0.0], [-0.5, 2.0]])
    assert weighted_sum(loss, weight, divisor=4).item() == (1 - 3 + 18) / 4


def test_nan_off_target_does_not_leak():
    mask = torch.tensor([[True, False, False]])
    for reduce in (
        lambda x: mean_over_tokens(x, mask, num_targets=1),
        lambda x: weighted_sum(x, mask.float(), divisor=1),
    ):
        loss = torch.tensor([[1.0, math.nan, math.inf]], requires_grad=True)
        out = reduce(loss)
        out.backward()
        assert out.item() == 1.0 and torch.equal(loss.grad, torch.tensor([[1.0, 0.0, 0.0]]))


def test_microbatch_without_targets_is_zero_with_a_graph():
    loss = torch.ones(1, 2, requires_grad=True)
    out = mean_over_tokens(loss, torch.zeros(1, 2, dtype=torch.bool), num_targets=7)
    out.backward()
    assert out.item() == 0.0 and loss.grad is not None


@pytest.mark.parametrize("count", [0, -3])
def test_empty_step_is_an_error_not_a_nan(count):
    with pytest.raises(NumericsError, match=f"num_targets must be positive, got {count}"):
        mean_over_tokens(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool), num_targets=count)
    with pytest.raises(NumericsError, match=f"divisor must be positive, got {count}"):
        weighted_sum(torch.zeros(1, 1), torch.zeros(1, 1), divisor=count)
    with pytest.raises(NumericsError, match="divisor must be positive, got nan"):
        weighted_sum(torch.zeros(1, 1), torch.zeros(1, 1), divisor=math.nan)
