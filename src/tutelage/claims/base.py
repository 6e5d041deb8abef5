"""What a claim is: a line, an experiment with a seed, and predictions with bounds that were fixed beforehand.

A claim is judged from numbers alone. Its experiment gives named numbers for each seed; a prediction says on which
side of a bound the mean of one of them lies. Three-valued: the 95% interval over seeds lies wholly on the predicted
side ("holds"), wholly on the other ("does not hold at this scale"), or has the bound inside ("inconclusive").
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from tutelage.errors import ConfigError, DataError
from tutelage.numerics.statistics import Estimate

Verdict = Literal["holds", "does not hold at this scale", "inconclusive"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold at this scale"
INCONCLUSIVE: Verdict = "inconclusive"
MIN_SEEDS = 4
"""Fewer seeds than this decide nothing: the verdict is inconclusive whatever they say."""

Numbers = Mapping[str, float]
"""One seed's numbers by name. Shares are in [0, 1], divergences and entropies in nats; names carry other units."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What became of one prediction."""

    verdict: Verdict
    text: str
    """A sentence with the numbers in it."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the results of all seeds say of a claim."""

    verdict: Verdict
    measured: Mapping[str, Estimate]
    """Name -> mean over seeds with its 95% interval."""
    statements: tuple[Statement, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "measured": {name: {**e.to_json(), "seeds": e.count} for name, e in self.measured.items()},
            "statements": [{"verdict": s.verdict, "text": s.text} for s in self.statements],
        }


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the chapter as an experiment."""

    name: str
    """As the command line takes it."""
    number: int
    """Which line of the chapter: 1 to 13."""
    line: str
    """What is claimed."""
    source: str
    """Who claims it, with arXiv ids."""
    design: str
    """What is done to see whether it holds, and what is predicted; fixed before anything was measured."""
    measure: Callable[[int], Numbers]
    """seed -> numbers. Deterministic; one thread; touches nothing outside."""
    judge: "Callable[[Sequence[Numbers]], Judgement]"
    """Usually `Predictions(...)`."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    minutes: float = 1.0
    """About how long all seeds take on one core."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The mean over seeds of one number lies above a bound, below one, or between two."""

    name: str
    """Which number of `Claim.measure`."""
    what: str
    """What the number is, as the subject of a sentence: "the slope of cloning's cost over the horizon"."""
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if self.above is None and self.below is None:
            raise ConfigError(f"prediction {self.name!r} needs a bound: above, below, or both")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ConfigError(f"prediction {self.name!r} needs above < below, got {self.above} and {self.below}")

    @property
    def bound(self) -> str:
        """The bound in words."""
        parts = [f"above {self.above:g}"] if self.above is not None else []
        parts += [f"below {self.below:g}"] if self.below is not None else []
        return " and ".join(parts)

    def judge(self, estimate: Estimate) -> Statement:
        """Where the interval lies."""
        is_in = (self.above is None or estimate.low > self.above) and (self.below is None or estimate.high < self.below)
        is_out = (self.above is not None and estimate.high < self.above) or (
            self.below is not None and estimate.low > self.below
        )
        verdict = HOLDS if is_in else FAILS if is_out else INCONCLUSIVE
        if estimate.count < MIN_SEEDS:
            verdict = INCONCLUSIVE
        few = f"; {MIN_SEEDS} seeds are needed" if estimate.count < MIN_SEEDS else ""
        text = f"{self.what}: {shown(estimate)}, predicted {self.bound}: {verdict}{few}"
        return Statement(verdict=verdict, text=text)


class Predictions:
    """A judge: the claim holds where every prediction does, and does not where one fails.

    Args:
        predictions: each about one number of the experiment. Numbers without a prediction are reported only.
    """

    def __init__(self, *predictions: Prediction) -> None:
        if not predictions:
            raise ConfigError("a claim needs at least one prediction that can fail")
        self.predictions = predictions

    def __call__(self, results: Sequence[Numbers]) -> Judgement:
        """
        Raises:
            DataError: no results, seeds with different numbers, or a predicted number that was not measured.
        """
        measured = over_seeds(results)
        missing = [p.name for p in self.predictions if p.name not in measured]
        if missing:
            raise DataError(f"predictions about {missing}, which were not measured; there are {sorted(measured)}")
        statements = tuple(p.judge(measured[p.name]) for p in self.predictions)
        return Judgement(verdict=combine(s.verdict for s in statements), measured=measured, statements=statements)


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """All must hold; one that fails decides."""
    found = set(verdicts)
    return FAILS if FAILS in found else INCONCLUSIVE if INCONCLUSIVE in found or not found else HOLDS


def over_seeds(results: Sequence[Numbers]) -> dict[str, Estimate]:
    """Name -> mean over seeds with its t-interval.

    Raises:
        DataError: no results, or the seeds' names differ.
    """
    if not results:
        raise DataError("a judgement needs at least one seed's numbers, got none")
    names = list(results[0])
    for i, numbers in enumerate(results):
        if set(numbers) != set(names):
            raise DataError(f"every seed must give the same numbers; seed {i} differs in {set(numbers) ^ set(names)}")
    return {name: t_interval([float(r[name]) for r in results]) for name in names}


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Mean with Student's interval: mean +- t_{n-1} sd / sqrt(n).

    One value has an infinite interval; equal values ("constant", e.g. an exact identity) one of no width.

    Raises:
        DataError: no value, or one that is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise DataError(f"a mean over seeds needs finite values, got {list(values)}")
    mean = float(x.mean())
    if x.size == 1:
        return Estimate(value=mean, low=-math.inf, high=math.inf, count=1, method="t", level=level)
    if np.ptp(x) == 0:
        value = float(x[0])
        return Estimate(value=value, low=value, high=value, count=x.size, method="constant", level=level)
    half = float(stats.t.ppf(0.5 + level / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return Estimate(value=mean, low=mean - half, high=mean + half, count=x.size, method="t", level=level)


def log_slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of log y over log x: the exponent of a power law.

    Raises:
        DataError: fewer than two points, or one that is not positive.
    """
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if x.size < 2 or x.shape != y.shape or (x <= 0).any() or (y <= 0).any():
        raise DataError(f"a slope on log axes needs two or more positive points, got {list(xs)} and {list(ys)}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def shown(estimate: Estimate) -> str:
    """The value and its 95% interval with four digits."""
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"
