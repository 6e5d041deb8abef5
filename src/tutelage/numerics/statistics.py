"""Statistics that evaluations and monitors share: unbiased pass@k, intervals, paired gains, the beta-binomial fit.

Axis letters: P prompts (tasks), R resamples. Everything is numpy in float64 and seeded; nothing here needs torch.

A task is the unit that is resampled: samples of one task are not independent evidence about other tasks, so every
interval on a mean over tasks is a cluster bootstrap over tasks. The bootstrap intervals are BCa (bias-corrected and
accelerated) with tails widened for few tasks; where BCa has no answer they fall back to percentiles and say so in
`method`. Monte Carlo error of an end is about 1% of the interval's width at the default 10,000 resamples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from tutelage.errors import DataError

Floats = NDArray[np.float64]
_CELLS = 4_000_000
"""Most resampled values held at once, so memory does not grow with the number of resamples (32 MB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float
    count: int
    """Independent units behind it: tasks for a cluster bootstrap, trials for a plain proportion."""
    method: str
    """How the interval was made: "bca", "percentile", "unseen", "wilson", "jeffreys", "t", "constant"."""
    level: float = 0.95

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def to_json(self) -> dict[str, Any]:
        """{"value": ..., "ci95": [low, high]}; the key names the level."""
        return {"value": self.value, f"ci{100 * self.level:g}": [self.low, self.high]}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


# -- pass@k -------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def _pass_at_k(n: int, c: int, k: int) -> float:
    if c == 0:
        return 0.0
    if n - c < k:
        return 1.0
    if k == 1:
        return c / n
    # C(n-c, k) / C(n, k) is a product over the shorter of the two runs; as a sum of logarithms it neither overflows
    # for large n nor loses the small differences from 1.
    few, many = min(c, k), max(c, k)
    i = np.arange(few, dtype=np.float64)
    return float(-np.expm1(np.log1p(-many / (n - i)).sum()))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is accepted, estimated without bias from c accepted among n.

    pass@k = 1 - C(n - c, k) / C(n, k)

    Raises:
        DataError: k < 1, c outside [0, n], or n < k (an estimate without bias does not exist then).

    Source:
        Chen et al. 2021, arXiv:2107.03374, equation 1.

    >>> round(pass_at_k(4, 2, 2), 4)
    0.8333
    """
    if k < 1 or not 0 <= c <= n:
        raise DataError(f"pass_at_k needs k >= 1 and 0 <= c <= n; got n={n}, c={c}, k={k}")
    if n < k:
        raise DataError(
            f"pass@{k} needs at least {k} valid samples of the task, got {n}: sample more, or ask for less k"
        )
    return _pass_at_k(int(n), int(c), int(k))


def pass_at_k_by_task(n_P: ArrayLike, c_P: ArrayLike, k: int) -> Floats:
    """(P,) pass@k of each task; nan where the task has fewer than k valid samples.

    Raises:
        DataError: k < 1, the lengths differ, or some c is outside [0, n].
    """
    ns, cs = np.asarray(n_P, dtype=np.int64), np.asarray(c_P, dtype=np.int64)
    if ns.shape != cs.shape or ns.ndim != 1:
        raise DataError(f"pass@k needs one n and one c for each task; got shapes {ns.shape} and {cs.shape}")
    pairs = zip(ns.tolist(), cs.tolist(), strict=True)
    return np.array([pass_at_k(n, c, k) if n >= k else _nan_if_counts(n, c, k) for n, c in pairs], dtype=np.float64)


def _nan_if_counts(n: int, c: int, k: int) -> float:
    if k < 1 or not 0 <= c <= n:
        raise DataError(f"pass_at_k needs k >= 1 and 0 <= c <= n; got n={n}, c={c}, k={k}")
    return math.nan


def expected_distinct(counts: Sequence[int], m: int) -> float:
    """Distinct kinds expected among m draws without replacement from samples of the given kinds.

    sum over kinds of 1 - C(n - count, m) / C(n, m),  n = sum(counts)

    Source:
        Rarefaction (Hurlbert 1971); the same formula as pass@k, kind by kind.
    """
    n = sum(counts)
    return math.fsum(pass_at_k(n, count, m) for count in counts)


# -- intervals of one proportion ----------------------------------------------------------------


def wilson(c: int, n: int, *, level: float = 0.95) -> Estimate:
    """A plain proportion (independent trials) with its Wilson score interval."""
    _check_trials(c, n)
    z = float(stats.norm.ppf(0.5 + level / 2))
    p = c / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if c == 0 else max(0.0, centre - half)
    high = 1.0 if c == n else min(1.0, centre + half)
    return Estimate(value=p, low=low, high=high, count=n, method="wilson", level=level)


def jeffreys(c: int, n: int, *, level: float = 0.95) -> Estimate:
    """A plain proportion with the Jeffreys interval: quantiles of Beta(c + 1/2, n - c + 1/2), 0 or 1 at the ends."""
    _check_trials(c, n)
    tail = (1 - level) / 2
    low = 0.0 if c == 0 else float(special.betaincinv(c + 0.5, n - c + 0.5, tail))
    high = 1.0 if c == n else float(special.betaincinv(c + 0.5, n - c + 0.5, 1 - tail))
    return Estimate(value=c / n, low=low, high=high, count=n, method="jeffreys", level=level)


def _check_trials(c: int, n: int) -> None:
    if n < 1 or not 0 <= c <= n:
        raise DataError(f"a proportion needs n >= 1 trials and 0 <= c <= n; got c={c}, n={n}")


# -- cluster bootstrap --------------------------------------------------------------------------


def resampled(statistic: Callable[[NDArray[np.int64]], Floats], num_tasks: int, *, seed: int, resamples: int) -> Floats:
    """(R,) `statistic` of resampled tasks. It takes indices (r, P) and gives (r,); called in chunks of bounded size."""
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // max(1, num_tasks))
    parts = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        parts.append(statistic(rng.integers(0, num_tasks, size=(rows, num_tasks))))
    return np.concatenate(parts)


def mean_over_tasks(
    values_P: ArrayLike,
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Estimate:
    """Mean over tasks with a bootstrap interval that resamples whole tasks (BCa).

    Where every task has the same value v the bootstrap sees no spread and would claim certainty. With `bounds` the
    interval is then what P equal observations still allow: with confidence `level`, at most a share
    q = 1 - (alpha/2)^(1/P) of tasks is different, so the mean lies in [v - q (v - lower), v + q (upper - v)]
    ("unseen"; for v = 0 this is the exact binomial bound, alpha = 1 - level).

    Args:
        values_P: one number for each task, e.g. its pass@k. nan is refused: leave such tasks out and say so.
        bounds: the values' possible range; None if they have none (then equal values give a zero-width interval).

    Raises:
        DataError: no task, or a value that is not finite.

    Source:
        Efron 1987, "Better bootstrap confidence intervals", equations 2.3 and 6.6, for a mean; the tails are widened
        for few tasks as in Hesterberg 2015, "What teachers should know about the bootstrap", which Efron's are not.
    """
    values = np.asarray(values_P, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise DataError(f"a mean over tasks needs at least one task; got shape {values.shape}")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise DataError(f"a mean over tasks needs finite values; {bad} of {values.size} are not: leave those tasks out")
    value, alpha = float(values.mean()), 1 - level
    if np.ptp(values) == 0:
        value = float(values[0])
        if bounds is None:
            return Estimate(value=value, low=value, high=value, count=values.size, method="constant", level=level)
        q = 1 - (alpha / 2) ** (1 / values.size)
        low, high = value - q * (value - bounds[0]), value + q * (bounds[1] - value)
        return Estimate(value=value, low=low, high=high, count=values.size, method="unseen", level=level)
    boot_R = _resampled_means(values, seed=seed, resamples=resamples)
    low, high, method = _bca(values, boot_R, alpha)
    return Estimate(value=value, low=low, high=high, count=values.size, method=method, level=level)


def _resampled_means(values: Floats, *, seed: int, resamples: int) -> Floats:
    kinds, counts = np.unique(values, return_counts=True)
    if 4 * kinds.size > values.size:
        return resampled(lambda idx: values[idx].mean(axis=1), values.size, seed=seed, resamples=resamples)
    # Few distinct values (pass@k of n samples has at most n + 1): how often each is drawn is multinomial, which is the
    # same distribution for a fraction of the work.
    drawn = np.random.default_rng(seed).multinomial(values.size, counts / values.size, size=resamples)
    return np.asarray(drawn @ kinds / values.size, dtype=np.float64)


def _bca(values: Floats, boot_R: Floats, alpha: float) -> tuple[float, float, str]:
    value = values.mean()
    below = (np.count_nonzero(boot_R < value) + 0.5 * np.count_nonzero(boot_R == value)) / boot_R.size
    deviation = values - value  # proportional to the jackknife differences of a mean
    a = float((deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5))
    # The bootstrap's spread is too small by sqrt((P - 1) / P), and its quantiles are a normal's where few tasks call
    # for Student's: the tails are widened to make up for both (Hesterberg 2015).
    wide = stats.norm.cdf(math.sqrt(values.size / (values.size - 1)) * stats.t.ppf(alpha / 2, values.size - 1))
    wide = max(wide, 0.5 / boot_R.size)  # no further out than the resamples reach
    tails = np.array([wide, 1 - wide])
    if not 0 < below < 1:
        low, high = np.quantile(boot_R, tails)
        return float(low), float(high), "percentile"
    z0 = stats.norm.ppf(below)
    z = z0 + stats.norm.ppf(tails)
    low, high = np.quantile(boot_R, stats.norm.cdf(z0 + z / (1 - a * z)))
    return float(low), float(high), "bca"


def paired_gain(
    before: dict[str, float],
    after: dict[str, float],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
) -> Estimate:
    """Mean of after - before over the same tasks, with a bootstrap that resamples tasks (the pair stays together).

    Args:
        before, after: task id -> its value (for example pass@1).

    Raises:
        DataError: the two sets of tasks differ. Unpaired values say much less, and nothing here pretends otherwise.
    """
    if before.keys() != after.keys():
        only_before, only_after = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        raise DataError(
            f"a paired gain needs the same tasks on both sides; {len(only_before)} only before "
            f"(e.g. {only_before[:3]}), {len(only_after)} only after (e.g. {only_after[:3]}). "
            "Evaluate both models on one task set, or restrict both to the tasks they share."
        )
    ids = sorted(before)
    diff_P = np.array([after[i] - before[i] for i in ids], dtype=np.float64)
    return mean_over_tasks(diff_P, seed=seed, level=level, resamples=resamples, bounds=bounds)


def ratio_over_tasks(
    numerators_P: ArrayLike,
    denominators_P: ArrayLike,
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Estimate:
    """sum(numerators) / sum(denominators) with a percentile bootstrap over tasks: e.g. nats per token.

    Raises:
        DataError: the lengths differ, or some denominator is not positive: leave such tasks out.
    """
    num, den = np.asarray(numerators_P, dtype=np.float64), np.asarray(denominators_P, dtype=np.float64)
    if num.shape != den.shape or num.ndim != 1 or num.size == 0:
        raise DataError(f"a ratio over tasks needs one numerator and denominator each; got {num.shape}, {den.shape}")
    if not (den > 0).all():
        raise DataError(f"a ratio over tasks needs positive denominators, {int((den <= 0).sum())} are not")
    value = float(num.sum() / den.sum())
    return bootstrap(
        lambda idx: num[idx].sum(axis=1) / den[idx].sum(axis=1),
        num.size,
        value=value,
        seed=seed,
        level=level,
        resamples=resamples,
    )


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], Floats],
    num_tasks: int,
    *,
    value: float,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Estimate:
    """Percentile interval of any statistic of resampled tasks; `statistic` takes indices (r, P) and gives (r,)."""
    boot_R = resampled(statistic, num_tasks, seed=seed, resamples=resamples)
    low, high = np.quantile(boot_R, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value=value, low=float(low), high=float(high), count=num_tasks, method="percentile", level=level)


def sign_flip_p(differences_P: ArrayLike, *, seed: int = 0, draws: int = 10_000) -> float:
    """Two-sided permutation p of "the mean difference is 0": each task's sign is flipped by a fair coin.

    p = (1 + number of draws with |mean| >= |observed|) / (1 + draws); never 0.
    """
    diff = np.asarray(differences_P, dtype=np.float64)
    if diff.size == 0:
        raise DataError("a permutation test needs at least one paired difference, got none")
    rng = np.random.default_rng(seed)
    observed, hits, step = abs(diff.sum()), 0, max(1, _CELLS // diff.size)
    tolerance = 1e-12 * np.abs(diff).sum()
    for start in range(0, draws, step):
        signs = rng.integers(0, 2, size=(min(step, draws - start), diff.size)) * 2.0 - 1.0
        hits += int(np.count_nonzero(np.abs(signs @ diff) >= observed - tolerance))
    return (1 + hits) / (1 + draws)


# -- groups of one prompt -----------------------------------------------------------------------


def all_same_by_task(n_P: ArrayLike, c_P: ArrayLike, group: int) -> tuple[Floats, Floats]:
    """Chance that a group of `group` samples of each task is all wrong, and all right: unbiased from c among n.

    all wrong = C(n - c, g) / C(n, g),   all right = C(c, g) / C(n, g);  nan where n < g.
    """
    ns, cs = np.asarray(n_P, dtype=np.int64), np.asarray(c_P, dtype=np.int64)
    return 1 - pass_at_k_by_task(ns, cs, group), 1 - pass_at_k_by_task(ns, ns - cs, group)


def all_same_probability(p: float, group: int) -> float:
    """p^g + (1 - p)^g: a group of g independent samples of one prompt is all right or all wrong.

    >>> round(all_same_probability(0.1, 8), 2)
    0.43
    """
    return p**group + (1 - p) ** group


@dataclass(frozen=True, slots=True, kw_only=True)
class BetaBinomial:
    """Solve rates spread over prompts as Beta(a, b); counts given a prompt are binomial."""

    a: float
    b: float
    log_likelihood: float
    """Nats, of all prompts, the binomial coefficients included."""

    @property
    def mean(self) -> float:
        return self.a / (self.a + self.b)

    def all_wrong(self, group: int) -> float:
        """E[(1 - p)^g]."""
        return float(np.exp(special.betaln(self.a, self.b + group) - special.betaln(self.a, self.b)))

    def all_right(self, group: int) -> float:
        """E[p^g]."""
        return float(np.exp(special.betaln(self.a + group, self.b) - special.betaln(self.a, self.b)))

    def pass_at_k(self, k: int) -> float:
        """E[1 - (1 - p)^k]: the coverage that the fitted spread of solve rates predicts."""
        return 1 - self.all_wrong(k)


def fit_beta_binomial(n_P: ArrayLike, c_P: ArrayLike) -> BetaBinomial:
    """Maximum-likelihood Beta(a, b) over prompts' solve rates.

    Searched over logit(mean) in [-12, 12] and log(a + b) in [-7, 9]: at the edges the fit is, to what the counts can
    tell, a point mass (all prompts alike) or a two-point split (each prompt always right or always wrong).

    Raises:
        DataError: no prompt has a valid sample, or the lengths differ.
    """
    ns, cs = np.asarray(n_P, dtype=np.float64), np.asarray(c_P, dtype=np.float64)
    if ns.shape != cs.shape or ns.ndim != 1:
        raise DataError(f"a beta-binomial fit needs one n and one c for each prompt; got shapes {ns.shape}, {cs.shape}")
    ns, cs = ns[ns > 0], cs[ns > 0]
    if ns.size == 0:
        raise DataError("a beta-binomial fit needs at least one prompt with a valid sample, got none")
    choose = float((special.gammaln(ns + 1) - special.gammaln(cs + 1) - special.gammaln(ns - cs + 1)).sum())

    def shape(x: Floats) -> tuple[float, float]:
        mean, total = float(special.expit(x[0])), math.exp(x[1])
        return max(mean * total, 1e-12), max((1 - mean) * total, 1e-12)

    def cost(x: Floats) -> float:
        a, b = shape(x)
        return -float((special.betaln(a + cs, b + ns - cs) - special.betaln(a, b)).sum())

    start = float(special.logit((cs.sum() + 0.5) / (ns.sum() + 1)))
    edges = [(-12.0, 12.0), (-7.0, 9.0)]
    runs = [optimize.minimize(cost, [start, s], method="L-BFGS-B", bounds=edges) for s in (-1.0, 1.0, 4.0)]
    best = min(runs, key=lambda r: float(r.fun))
    a, b = shape(best.x)
    return BetaBinomial(a=a, b=b, log_likelihood=choose - float(best.fun))
