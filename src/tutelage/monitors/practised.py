"""Questions that are practised against those that are not: what is known by heart carries no signal for RL."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance
from typing import Any

from tutelage.monitors.probe import Probe
from tutelage.types import Draw, Status, Trajectory


@dataclass(frozen=True, kw_only=True)
class Practised:
    """pass@1 on the questions of a draw and on the probe's, of the same weights."""

    tasks: int
    """Questions of the draw."""
    draw: float
    probe: float
    half_width: float
    """Of the gap's 95% interval: two independent means over questions, normal approximation."""

    @property
    def gap(self) -> float:
        return self.draw - self.probe

    @property
    def is_by_heart(self) -> bool:
        """Measurably better on what is practised."""
        return self.gap - self.half_width > 0

    @property
    def why(self) -> str:
        low, high = self.gap - self.half_width, self.gap + self.half_width
        return (
            f"on the questions it practises pass@1 is {self.draw:.1%}, {self.gap:+.1%} [{low:+.1%}, {high:+.1%}] from "
            f"the probe's: give RL questions that were not practised, or G5 promises more signal than it will find"
        )

    def to_json(self) -> dict[str, Any]:
        low, high = self.gap - self.half_width, self.gap + self.half_width
        return {
            "tasks": self.tasks,
            "pass@1": self.draw,
            "pass@1_of_probe": self.probe,
            "gap": {"value": self.gap, "ci95": [low, high]},
            "is_by_heart": self.is_by_heart,
        }


def practised(draw: Draw, probes: Sequence[Probe]) -> Practised | None:
    """Compares a draw with the probe of the weights that drew it, the last of these probes if there are several.

    Counted are judged samples of exactly those weights, at temperature 1 and top-p 1, to the question as it is (not
    with a hint). None where there are none, as in a stage that draws from another model.

    Formula: gap = mean_q c_q / n_q over the draw's questions − the same over the probe's; its half-width is
    1.96 · √(s_d² / D + s_p² / P), with the variances over questions. Measured before the round trains on the draw, so
    what one round learns by heart shows in the next.
    """
    by_version = {p.version: p for p in probes}
    counts: dict[str, dict[str, list[bool]]] = {version: {} for version in by_version}
    for t in draw:
        version = _whose(t)
        if version in counts and t.verdict is not None and t.verdict.status is not Status.ERROR:
            counts[version].setdefault(t.task_id, []).append(t.verdict.is_accepted)
    for version, probe in reversed(by_version.items()):
        drawn = [fmean(c) for c in counts[version].values()]
        probed = [t.c / t.n for t in probe.tasks if t.n > 0]
        if len(drawn) > 1 and len(probed) > 1:
            half = NormalDist().inv_cdf(0.975) * math.sqrt(
                variance(drawn) / len(drawn) + variance(probed) / len(probed)
            )
            return Practised(tasks=len(drawn), draw=fmean(drawn), probe=fmean(probed), half_width=half)
    return None


def _whose(t: Trajectory) -> str:
    """The weights that wrote all that was sampled of it, from their own distribution; "" where that is not so."""
    versions = {
        s.policy_version if s.is_context_exact and s.sampling and s.sampling.samples_own_distribution else None
        for s in t.spans
        if s.is_sampled
    }
    return (versions.pop() or "") if len(versions) == 1 else ""
