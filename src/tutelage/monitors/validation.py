"""The student's loss on recorded trajectories it never trains on: what an adaptive share of rollouts listens to."""

from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.errors import ConfigError, DataError
from tutelage.monitors.drift import mean_nll
from tutelage.types import Draw, DrawContext, MonitorReport, Scorer, Trajectory


class ValidationLoss:
    """Mean of -log p over the targets of held-out trajectories, nats a target; every so many rounds, and at the start.

    The value goes into the run's scores, where sources find it (`DrawContext.scores`). It never stops a stage.

    Args:
        trajectories: recorded, and in no training draw.
        scorer: the student as it is now (`train.Trainer`).
        every_rounds: how often.
        metric: its name among the scores.
    """

    saves_rounds = False
    """True would make the run keep a checkpoint of every round, to go back to."""

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        scorer: Scorer,
        *,
        every_rounds: int = 10,
        metric: str = "validation/loss_nats_per_target",
    ) -> None:
        if every_rounds < 1:
            raise ConfigError(f"every_rounds must be at least 1, got {every_rounds}")
        if not any(t.num_targets for t in trajectories):
            raise DataError("a validation loss needs recorded trajectories with something to predict, got none")
        self.trajectories = [t for t in trajectories if t.num_targets]
        self.scorer, self.every_rounds, self.metric = scorer, every_rounds, metric

    def start(self, ctx: DrawContext) -> MonitorReport:
        """The loss before the first update."""
        found = mean_nll(self.trajectories, self.scorer, seed=ctx.seed)
        evidence = {"loss_nats_per_target": found.to_json(), "num_trajectories": len(self.trajectories)}
        return MonitorReport(verdict="CONTINUE", evidence=evidence, scores={self.metric: found.value})

    def after_round(self, draw: Draw, ctx: DrawContext) -> MonitorReport | None:
        return self.start(ctx) if (ctx.round + 1) % self.every_rounds == 0 else None

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """There is no state: the scores are the run's."""
