"""Drawing tokens: the stream of uniforms, exact inversion, and the log-probabilities that belong to a draw."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tutelage.errors import NumericsError
from tutelage.numerics.logprobs import entropy, shape_logits, target_logprobs
from tutelage.policies.drawing import draw_tokens, invert, uniform


def test_uniforms_fill_the_unit_interval_evenly_over_steps_and_over_seeds():
    over_steps = uniform(np.full(20_000, 5), np.arange(20_000))
    over_seeds = uniform(np.arange(20_000), np.zeros(20_000))
    for u in (over_steps, over_seeds):
        assert u.min() >= 0 and u.max() < 1
        assert stats.kstest(u, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


def test_streams_of_neighbouring_seeds_do_not_run_along_each_other():
    a, b = (uniform(np.full(500, seed), np.arange(500)) for seed in (1, 2))
    shared = set(a.tolist()) & set(b.tolist())
    assert not shared
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


def test_a_uniform_depends_on_its_own_seed_and_step_only():
    alone = uniform(np.array([2**62 + 3]), np.array([7]))
    among = uniform(np.array([1, 2**62 + 3, 9]), np.array([0, 7, 7]))
    assert alone[0] == among[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
def test_inversion_takes_the_first_token_past_the_goal(size, u, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, size, generator=generator) * (torch.rand(1, size, generator=generator) > 0.3)
    weights[0, int(seed) % size] += 0.5
    token, mass = invert(weights, torch.tensor([u], dtype=torch.float64))
    cumulative = weights[0].double().cumsum(0)
    assert weights[0, token[0]] > 0
    # Float32 block sums may move the goal by their rounding, not further.
    slack = 1e-6 * float(mass[0])
    assert float(cumulative[token[0]]) > u * float(mass[0]) - slack
    assert float(cumulative[token[0]] - weights[0, token[0]]) <= u * float(mass[0]) + slack


@pytest.mark.parametrize("size", [5, 128, 300])
def test_the_largest_uniform_never_falls_off_the_end(size):
    weights = torch.zeros(1, size)
    weights[0, 2] = 1.0
    token, _ = invert(weights, torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    assert token.tolist() == [2]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.3, 0.5)])
def test_frequencies_match_the_exact_probabilities(temperature, top_p):
    torch.manual_seed(3)
    logits = torch.randn(300) * 2
    num_draws = 20_000
    u = uniform(np.arange(num_draws), np.zeros(num_draws)).tolist()
    drawn = draw_tokens(logits.expand(num_draws, -1), u, temperature=temperature, top_p=top_p)
    expected = shape_logits(logits[None], temperature=temperature, top_p=top_p)[0].double().softmax(-1) * num_draws
    counts = torch.bincount(torch.tensor(drawn.tokens), minlength=300).double()
    assert counts[expected == 0].sum() == 0
    rare = (expected < 10) & (expected > 0)
    observed = [*counts[expected >= 10].tolist(), float(counts[rare].sum())]
    predicted = [*expected[expected >= 10].tolist(), float(expected[rare].sum())]
    if predicted[-1] == 0:
        observed, predicted = observed[:-1], predicted[:-1]
    assert stats.chisquare(observed, predicted, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.9), (1.4, 0.7)])
def test_logprobs_are_those_of_the_shaped_distribution_and_entropies_of_the_unshaped(temperature, top_p):
    torch.manual_seed(4)
    logits = torch.randn(40, 777) * 3
    drawn = draw_tokens(logits, torch.rand(40).tolist(), temperature=temperature, top_p=top_p)
    shaped = shape_logits(logits.double(), temperature=temperature, top_p=top_p)
    torch.testing.assert_close(
        torch.tensor(drawn.logprobs, dtype=torch.float64),
        target_logprobs(shaped, torch.tensor(drawn.tokens)),
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(
        torch.tensor(drawn.entropies, dtype=torch.float64), entropy(logits.double()), atol=1e-5, rtol=0
    )


def test_greedy_takes_the_best_token_with_its_log_probability_at_temperature_one():
    torch.manual_seed(5)
    logits = torch.randn(6, 50)
    drawn = draw_tokens(logits, [0.9] * 6, temperature=0, top_p=1.0)
    assert drawn.tokens == logits.argmax(-1).tolist()
    expected = logits.double().log_softmax(-1).amax(-1).tolist()
    assert drawn.logprobs == pytest.approx(expected, abs=1e-6)


def test_rows_do_not_change_with_the_rows_beside_them():
    torch.manual_seed(6)
    logits = torch.randn(9, 5000)
    u = torch.rand(9).tolist()
    together = draw_tokens(logits, u, temperature=0.9, top_p=0.95)
    for row in range(9):
        alone = draw_tokens(logits[row : row + 1], u[row : row + 1], temperature=0.9, top_p=0.95)
        assert alone.tokens == together.tokens[row : row + 1]


def test_banned_tokens_are_never_drawn_and_leave_the_entropy_finite():
    logits = torch.zeros(3, 200)
    logits[:, 100:] = -torch.inf
    drawn = draw_tokens(logits, [0.0, 0.5, 0.999999], temperature=1.0, top_p=1.0)
    assert max(drawn.tokens) < 100
    assert drawn.entropies == pytest.approx([np.log(100)] * 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_logits_are_an_error(bad):
    logits = torch.zeros(2, 10)
    logits[1, 3] = bad
    with pytest.raises(NumericsError, match=r"rows \[1\] of 2"):
        draw_tokens(logits, [0.5, 0.5], temperature=1.0, top_p=1.0)
