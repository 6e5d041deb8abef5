"""pass@k, intervals, paired gains and the beta-binomial fit against enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from tutelage.errors import DataError
from tutelage.numerics.statistics import (
    all_same_by_task,
    all_same_probability,
    expected_distinct,
    fit_beta_binomial,
    jeffreys,
    mean_over_tasks,
    paired_gain,
    pass_at_k,
    pass_at_k_by_task,
    sign_flip_p,
    wilson,
)

# -- pass@k -------------------------------------------------------------------------------------


def pass_at_k_by_subsets(outcomes, k):
    """Every subset of k samples, asked whether it has an accepted one."""
    subsets = list(itertools.combinations(outcomes, k))
    return sum(any(s) for s in subsets) / len(subsets)


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_an_accepted_sample(n):
    for c in range(n + 1):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(pass_at_k_by_subsets(outcomes, k), abs=1e-14)


@given(st.integers(1, 3000), st.data())
@settings(deadline=None, max_examples=60)
def test_pass_at_k_equals_exact_integers_for_large_n(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    total = math.comb(n, k)
    exact = (total - math.comb(n - c, k)) / total  # integers until the last division
    assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9, abs=1e-300)


def test_pass_at_k_keeps_small_values_of_huge_n():
    assert pass_at_k(10**7, 1, 10) == pytest.approx(1e-6, rel=1e-12)


@pytest.mark.parametrize(("p", "n", "k"), [(0.3, 6, 1), (0.3, 6, 4), (0.05, 8, 8)])
def test_pass_at_k_is_unbiased_over_the_binomial(p, n, k):
    mean = sum(stats.binom.pmf(c, n, p) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_names_the_counts_it_refuses(n, c, k):
    with pytest.raises(DataError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_pass_at_k_refuses_fewer_samples_than_k_and_by_task_gives_nan():
    with pytest.raises(DataError, match=r"pass@8 needs at least 8 valid samples of the task, got 7"):
        pass_at_k(7, 3, 8)
    values = pass_at_k_by_task([8, 7], [1, 7], 8)
    assert values[0] == 1.0 and np.isnan(values[1])
    with pytest.raises(DataError, match="c=9"):
        pass_at_k_by_task([4], [9], 8)


def test_expected_distinct_is_the_mean_over_subsets():
    kinds = ["a", "a", "a", "b", "b", "c"]
    for m in range(1, 7):
        subsets = list(itertools.combinations(kinds, m))
        mean = sum(len(set(s)) for s in subsets) / len(subsets)
        assert expected_distinct([3, 2, 1], m) == pytest.approx(mean, abs=1e-12)


# -- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [wilson, jeffreys])
def test_proportion_intervals_cover_on_average_over_p(interval):
    n, covered = 30, []
    bounds = [interval(c, n) for c in range(n + 1)]
    for p in np.linspace(0.02, 0.98, 97):
        covered.append(sum(stats.binom.pmf(c, n, p) * (bounds[c].low <= p <= bounds[c].high) for c in range(n + 1)))
    assert 0.94 <= np.mean(covered) <= 0.97
    assert min(covered) > 0.8


def test_proportion_intervals_of_known_counts():
    assert wilson(15, 50).low == pytest.approx(0.19103, abs=1e-5)  # Newcombe's worked example of the score interval
    assert wilson(15, 50).high == pytest.approx(0.43750, abs=1e-5)
    assert jeffreys(0, 64).low == 0 and jeffreys(64, 64).high == 1
    assert jeffreys(3, 10).high == pytest.approx(stats.beta.ppf(0.975, 3.5, 7.5), abs=1e-10)
    with pytest.raises(DataError, match="c=3, n=2"):
        wilson(3, 2)


def test_bootstrap_over_tasks_covers_skewed_rates():
    rng = np.random.default_rng(0)
    a, b, tasks, n, k = 0.4, 1.2, 60, 8, 4
    truth = 1 - integrate.quad(lambda p: stats.beta.pdf(p, a, b) * (1 - p) ** k, 0, 1)[0]
    hits, widths = 0, []
    for trial in range(1000):
        c_P = rng.binomial(n, rng.beta(a, b, tasks))
        e = mean_over_tasks(pass_at_k_by_task([n] * tasks, c_P, k), seed=trial, resamples=600)
        hits += e.low <= truth <= e.high
        widths.append(e.half_width)
    assert 0.92 <= hits / 1000 <= 0.98
    assert 0.05 < np.mean(widths) < 0.15


def test_clusters_widen_the_interval_against_pooled_samples():
    """20 tasks, each solved always or never: 20 facts, not 640."""
    values = [1.0] * 10 + [0.0] * 10
    clustered = mean_over_tasks(values)
    pooled = wilson(320, 640)
    assert clustered.half_width > 4 * pooled.half_width


def test_no_spread_is_not_certainty():
    e = mean_over_tasks([0.0] * 20)
    assert e.method == "unseen" and e.low == 0
    assert e.high == pytest.approx(1 - 0.025 ** (1 / 20), rel=1e-12)
    assert (1 - e.high) ** 20 == pytest.approx(0.025)  # a mean of `high` would show only zeros that rarely
    ones = mean_over_tasks([1.0] * 20)
    assert (ones.low, ones.high) == (pytest.approx(1 - e.high), 1.0)
    same = mean_over_tasks([0.0] * 20, bounds=(-1.0, 1.0))
    assert same.low == pytest.approx(-same.high)
    assert mean_over_tasks([2.5] * 3, bounds=None).method == "constant"


def test_bootstrap_is_seeded_and_chunks_do_not_change_it(monkeypatch):
    values = np.random.default_rng(1).random(37)
    e = mean_over_tasks(values, seed=5)
    assert e == mean_over_tasks(values, seed=5)
    assert e != mean_over_tasks(values, seed=6)
    monkeypatch.setattr("tutelage.numerics.statistics._CELLS", 37 * 100)
    assert mean_over_tasks(values, seed=5) == e


def test_bca_moves_towards_the_long_tail():
    values = [0.0] * 45 + [1.0] * 5
    e = mean_over_tasks(values)
    assert e.method == "bca"
    assert e.high - e.value > e.value - e.low


@pytest.mark.parametrize("repeats", [1, 6])
def test_bca_agrees_with_scipys_at_the_widened_level(repeats):
    """Skewed values, where bias correction and acceleration matter; repeated ones take the multinomial path."""
    values = np.repeat(np.random.default_rng(2).lognormal(0, 1.2, 12), repeats)
    size = values.size
    tail = stats.norm.cdf(math.sqrt(size / (size - 1)) * stats.t.ppf(0.025, size - 1))
    ours = mean_over_tasks(values, seed=1, resamples=40_000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="BCa", confidence_level=1 - 2 * tail, n_resamples=40_000, rng=2
    ).confidence_interval
    plain = stats.bootstrap(
        (values,), np.mean, method="percentile", confidence_level=1 - 2 * tail, n_resamples=40_000, rng=2
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)
    assert plain.high < theirs.high - 0.06 * width


def test_a_mean_refuses_what_is_not_a_number():
    with pytest.raises(DataError, match="2 of 3 are not"):
        mean_over_tasks([1.0, math.nan, math.inf])
    with pytest.raises(DataError, match="at least one task"):
        mean_over_tasks([])


# -- paired -------------------------------------------------------------------------------------


def test_paired_gain_is_narrower_than_unpaired_and_covers():
    rng = np.random.default_rng(11)
    population = rng.beta(0.5, 0.5, 500_000)
    truth = float((np.clip(population + 0.05, 0, 1) - population).mean())
    hits, paired, loose, ids = 0, [], [], [str(i) for i in range(40)]
    for trial in range(1000):
        p = rng.beta(0.5, 0.5, 40)
        b, a = rng.binomial(16, p) / 16, rng.binomial(16, np.clip(p + 0.05, 0, 1)) / 16
        e = paired_gain(dict(zip(ids, b, strict=True)), dict(zip(ids, a, strict=True)), seed=trial, resamples=400)
        hits += e.low <= truth <= e.high
        paired.append(e.half_width)
        loose.append(1.96 * math.sqrt(b.var() / 40 + a.var() / 40))
    assert 0.92 <= hits / 1000 <= 0.98
    assert np.mean(paired) < 0.4 * np.mean(loose)


def test_paired_gain_pairs_by_name_not_by_position():
    before = {"a": 0.0, "b": 1.0}
    after = {"b": 1.0, "a": 0.0}
    e = paired_gain(before, after)
    assert e.value == 0 and e.method == "unseen"  # no task changed: there is no spread to resample


def test_unpaired_values_are_refused_by_name():
    with pytest.raises(DataError, match=r"1 only before \(e\.g\. \['b'\]\), 2 only after"):
        paired_gain({"a": 0.0, "b": 1.0}, {"a": 0.0, "c": 1.0, "d": 1.0})


def test_sign_flip_p_by_enumeration():
    diff = [0.5, 0.25, -0.1, 0.4, 0.3, 0.2]
    flips = [
        abs(sum(s * d for s, d in zip(signs, diff, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    exact = sum(f >= abs(sum(diff)) - 1e-12 for f in flips) / len(flips)
    assert sign_flip_p(diff, draws=20_000) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p([0.0, 0.0]) == 1.0


# -- groups -------------------------------------------------------------------------------------


def test_all_same_by_task_is_the_share_of_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            outcomes = [1] * c + [0] * (n - c)
            for g in range(1, n + 1):
                subsets = list(itertools.combinations(outcomes, g))
                wrong, right = all_same_by_task([n], [c], g)
                assert wrong[0] == pytest.approx(sum(not any(s) for s in subsets) / len(subsets), abs=1e-12)
                assert right[0] == pytest.approx(sum(all(s) for s in subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("p", "expected"), [(0.1, 0.43), (0.25, 0.10), (0.5, 0.008), (0.9, 0.43)])
def test_all_same_probability_of_known_rates(p, expected):
    assert all_same_probability(p, 8) == pytest.approx(expected, abs=0.005)


def test_beta_binomial_fit_recovers_the_spread():
    rng = np.random.default_rng(0)
    p = rng.beta(0.6, 1.4, 4000)
    fit = fit_beta_binomial(np.full(4000, 16), rng.binomial(16, p))
    assert fit.a == pytest.approx(0.6, rel=0.1) and fit.b == pytest.approx(1.4, rel=0.1)
    integral = integrate.quad(lambda x: stats.beta.pdf(x, fit.a, fit.b) * (x**8 + (1 - x) ** 8), 0, 1)[0]
    assert fit.all_wrong(8) + fit.all_right(8) == pytest.approx(integral, rel=1e-5)


def test_beta_binomial_likelihood_is_scipys_and_no_neighbour_is_better():
    n, c = [8, 8, 8, 8, 6], [0, 3, 8, 5, 2]
    fit = fit_beta_binomial(n, c)
    assert fit.log_likelihood == pytest.approx(stats.betabinom.logpmf(c, n, fit.a, fit.b).sum(), abs=1e-9)
    for da, db in itertools.product((0.9, 1, 1.1), repeat=2):
        assert stats.betabinom.logpmf(c, n, fit.a * da, fit.b * db).sum() <= fit.log_likelihood + 1e-6


def test_beta_binomial_fit_at_the_edges():
    split = fit_beta_binomial([8] * 6, [0, 8] * 3)
    assert split.all_wrong(8) == pytest.approx(0.5, abs=0.01) and split.all_right(8) == pytest.approx(0.5, abs=0.01)
    alike = fit_beta_binomial([8] * 20, [4] * 20)
    assert alike.all_wrong(8) == pytest.approx(0.5**8, rel=0.1)
    assert fit_beta_binomial([8] * 5, [0] * 5).all_wrong(8) > 0.99
    with pytest.raises(DataError, match="at least one prompt"):
        fit_beta_binomial([0], [0])
