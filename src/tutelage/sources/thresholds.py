"""ReST's Grow and Improve: one draw is trained on several times, each time a stricter part of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tutelage.data.rounds import RoundStore
from tutelage.errors import ConfigError, DataError
from tutelage.sources.accepted import Budget, Keep, keep_stats, marked_in
from tutelage.types import Draw, DrawContext, Group, Source, Status, Trajectory


class RisingThresholds:
    """A Grow round draws; it and the rounds after it train on what scores more than their threshold.

    Round r belongs to Grow r // len(thresholds) and has threshold r % len(thresholds). Only Grow rounds sample; the
    Improve rounds after them train on the same draw again and are off-policy. The draw is kept on disk, so a resumed
    run improves on the same one.

    Args:
        source: judged completions.
        thresholds: rising; scores, or with `are_quantiles` shares of the draw's scores (0.7: the best 30%, with those
            that equal the quantile).
        keep: further rules, applied after the threshold; its own `min_score` must be None.
        budget: as for `Accepted`.

    Source:
        Gulcehre et al. 2023 (ReST), arXiv:2308.08998.
    """

    def __init__(
        self,
        source: Source,
        thresholds: Sequence[float],
        *,
        keep: Keep | None = None,
        are_quantiles: bool = False,
        budget: Budget | None = None,
    ) -> None:
        problems = []
        if not thresholds or list(thresholds) != sorted(thresholds):
            problems.append(f"thresholds must rise and there must be at least one, got {list(thresholds)}")
        if are_quantiles and not all(0 <= t < 1 for t in thresholds):
            problems.append(f"thresholds that are quantiles must be in [0, 1), got {list(thresholds)}")
        if keep is not None and keep.min_score is not None:
            problems.append(f"keep.min_score must be null where thresholds say what is kept, got {keep.min_score}")
        if problems:
            raise ConfigError(problems)
        self.source, self.thresholds, self.are_quantiles = source, tuple(thresholds), are_quantiles
        self.keep, self.budget = keep or Keep(), budget
        self._grown: Draw | None = None
        self._round: int | None = None
        """The round that drew it."""

    def draw(self, ctx: DrawContext) -> Draw:
        improve = ctx.round % len(self.thresholds)
        if improve == 0:
            self._grow(ctx)
        grown = self._again(ctx)
        threshold, least = self._threshold(grown, self.thresholds[improve])
        keep = replace(self.keep, min_score=least)
        out = grown.with_trajectories([t for g in grown.groups for t in marked_in(g, keep, ctx, self.budget)])
        stats = {**out.stats, **keep_stats(out), "data/threshold": threshold, "data/improve": float(improve)}
        if improve:
            return replace(out, author="recorded", is_on_policy=False, stats=stats)
        return replace(out, stats=stats)

    def _threshold(self, grown: Draw, threshold: float) -> tuple[float, float]:
        """It as a score, and the least score that passes it: the next larger number, or the quantile itself."""
        if not self.are_quantiles:
            return threshold, float(np.nextafter(threshold, np.inf))
        scores = [_score(t) for t in grown if _is_judged(t)]
        quantile = float(np.quantile(scores, threshold)) if scores else 0.0  # nothing was judged: nothing is kept
        return quantile, quantile

    def _grow(self, ctx: DrawContext) -> None:
        self._grown, self._round = self.source.draw(ctx), ctx.round
        if ctx.kept and (ctx.processes is None or ctx.processes.is_first):
            self._store(ctx).commit(ctx.round, list(self._grown))

    def _store(self, ctx: DrawContext) -> RoundStore:
        assert ctx.kept is not None
        return RoundStore(ctx.kept / "grown")

    def _again(self, ctx: DrawContext) -> Draw:
        """The newest Grow's draw, from disk after a resume."""
        if self._grown is None:
            if self._round is None or ctx.kept is None:
                raise DataError(f"round {ctx.round} improves on a draw, but none was grown in this stage")
            tasks = {task.hash: task for task in tasks_of(self.source)}
            groups: dict[int, list[Trajectory]] = {}
            for t in self._store(ctx).load(self._round) or []:
                groups.setdefault(t.prompt_index, []).append(t)
            if not groups:
                raise DataError(f"the draw of round {self._round} is missing from {self._store(ctx).path}")
            found = (Group(task=tasks[ts[0].task_hash], trajectories=tuple(ts)) for ts in groups.values())
            self._grown = Draw(groups=tuple(found), author="student")
        return self._grown

    def state(self) -> Mapping[str, Any]:
        return {"inner": self.source.state(), "round": self._round}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state["inner"])
        self._round, self._grown = state["round"], None


def tasks_of(source: Any) -> list[Any]:
    """The tasks at the bottom of a chain of wrapped sources."""
    while not hasattr(source, "tasks"):
        source = source.source
    return list(source.tasks)


def _is_judged(t: Trajectory) -> bool:
    return t.verdict is not None and t.verdict.status is not Status.ERROR


def _score(t: Trajectory) -> float:
    return t.verdict.score if t.verdict is not None and t.verdict.score is not None else 0.0
