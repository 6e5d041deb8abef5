"""What training cost elsewhere: other task sets before and after, and held-out demonstrations under both models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.errors import DataError
from tutelage.evals.result import Comparison, EvalResult, compare
from tutelage.monitors.drift import mean_nll, nll_by_task, sampled_kl
from tutelage.numerics.statistics import Estimate, paired_gain
from tutelage.types import Scorer, Trajectory

__all__ = ["Retention", "mean_nll", "nll_change", "retention", "sampled_kl"]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Change on task sets that were not trained for."""

    sets: Mapping[str, Comparison]
    """Task set -> change from before to after, paired by task; negative is forgetting."""

    @property
    def lost(self) -> tuple[str, ...]:
        """Sets where the whole 95% interval is below 0."""
        return tuple(name for name, c in self.sets.items() if c.gain.high < 0)

    def rows(self) -> list[tuple[str, float, float, float, tuple[float, float]]]:
        """(set, before, after, change, its 95% interval), for a text table."""
        return [(n, c.before, c.after, c.gain.value, (c.gain.low, c.gain.high)) for n, c in self.sets.items()]

    def to_json(self) -> dict[str, Any]:
        return {"sets": {name: c.to_json() for name, c in self.sets.items()}, "lost": list(self.lost)}


def retention(
    before: Mapping[str, EvalResult], after: Mapping[str, EvalResult], *, metric: str = "pass@1"
) -> Retention:
    """The change on each other task set, paired by task, with its interval.

    Raises:
        DataError: the two sides do not hold the same sets, or a set not the same tasks.
    """
    if before.keys() != after.keys():
        raise DataError(
            f"retention needs the same task sets before and after; got {sorted(before)} and {sorted(after)}"
        )
    return Retention(sets={n: compare(before[n], after[n], metric=metric, name=n) for n in before})


def nll_change(demonstrations: Sequence[Trajectory], before: Scorer, after: Scorer, *, seed: int = 0) -> Estimate:
    """Mean NLL of held-out demonstrations after minus before, nats per token, tasks weighted alike, paired by task.

    Negative is better. Each task's NLL is over all its demonstrations' targets.
    """
    old, new = nll_by_task(demonstrations, before), nll_by_task(demonstrations, after)
    return paired_gain(old, new, seed=seed, bounds=None)
