"""A share of student rollouts that grows when validation says it must (DistiLLM)."""

from collections.abc import Mapping
from typing import Any

from tutelage.errors import ConfigError


class AdaptiveShare:
    """phi: the share of prompts answered by the student rather than taken from the data.

    It starts low, as long as the teacher's or human's text still teaches cheaply. At each new validation score worse by
    `tolerance` than the one before, the student is drifting from what it is trained on, and phi grows by `step`.

    A source uses it through the newest validation scores of its context:

        share.update(ctx.scores)                        # once a draw, before any coin is tossed
        what = share.choose(coin, progress, is_full)    # for each prompt: "fresh", "replay" or "recorded"

    Args:
        start: phi before the first validation.
        step: how much phi grows.
        tolerance: a validation loss this much above the previous one, in its own unit, counts as worse.
        maximum: phi never exceeds this.
        metric: name in `ctx.scores`; smaller is better.

    Source:
        Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.2, with the published code's numbers.
    """

    def __init__(
        self,
        *,
        start: float = 0.0,
        step: float = 0.1,
        tolerance: float = 0.1,
        maximum: float = 1.0,
        metric: str = "validation/loss_nats_per_target",
    ) -> None:
        problems = [
            f"{n} must be in [0, 1], got {v}" for n, v in (("start", start), ("maximum", maximum)) if not 0 <= v <= 1
        ]
        if start > maximum:
            problems.append(f"start ({start}) is above maximum ({maximum})")
        if step < 0 or tolerance < 0:
            problems.append(f"step and tolerance must not be negative, got {step} and {tolerance}")
        if problems:
            raise ConfigError(problems)
        self.step, self.tolerance, self.maximum, self.metric = step, tolerance, maximum, metric
        self.value = start
        self._last_score: float | None = None

    def update(self, scores: Mapping[str, float]) -> float:
        """Take note of the newest scores; returns phi. A score that is still the same one says nothing."""
        score = scores.get(self.metric)
        if score is None or score == self._last_score:
            return self.value
        if self._last_score is not None and score >= self._last_score + self.tolerance:
            self.value = min(self.maximum, round(self.value + self.step, 10))
        self._last_score = score
        return self.value

    def choose(self, coin: float, progress: float, *, is_buffer_full: bool) -> str:
        """What one prompt is answered with.

        fresh     coin < phi * (1 - progress), or coin < phi while the buffer is not full: sampled now
        replay    otherwise coin < phi: an earlier sample from the buffer
        recorded  otherwise: the data

        Args:
            coin: uniform in [0, 1).
            progress: share of the training done: fresh samples become rarer.
        """
        if coin >= self.value:
            return "recorded"
        return "fresh" if coin < self.value * (1 - progress) or not is_buffer_full else "replay"

    def state(self) -> Mapping[str, Any]:
        return {"value": self.value, "last_score": self._last_score}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.value, self._last_score = state["value"], state["last_score"]
