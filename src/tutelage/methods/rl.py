"""After graduation: policy gradients on the same draws and verdicts. One stage, named by its advantage."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from tutelage.methods.family import Sampling, drawn_of, stage_of
from tutelage.methods.settings import Positive, TrainSettings
from tutelage.signals import PolicyGradient
from tutelage.sources import Judged, Refilled
from tutelage.train.loop import Stage
from tutelage.types import Source

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

LR = 1e-6
DEFAULTS: dict[str, dict[str, Any]] = {
    "reinforce": {"advantage": "reinforce", "reward": "signed"},
    "reinforce_rej": {"advantage": "reinforce_rej", "reward": "signed"},
    "rloo": {"advantage": "rloo", "reward": "accepted"},
    "grpo": {"advantage": "grpo", "reward": "accepted"},
    "raft_pp": {"advantage": "raft", "reward": "accepted"},
}
"""What each name stands for."""


class PolicyGradientStage(Sampling):
    """Settings of a policy-gradient stage."""

    method: Literal["reinforce", "reinforce_rej", "rloo", "grpo", "raft_pp"]
    name: str = "rl"
    """The stage's name within a plan."""
    train: TrainSettings = Field(
        default_factory=lambda: TrainSettings(batch_size=None, schedule="constant", warmup=0.0, betas=(0.9, 0.99))
    )
    rounds: Positive = 100
    """Draws, each with one update unless train.batch_size or train.epochs make it more."""
    gate: bool = False
    """Take a round back that made the model measurably worse; rounds of one update are not gated."""
    reward: Literal["accepted", "signed", "score"] | None = None
    """accepted: 1 or 0; signed: 1 or -1; score: the verifier's number. null is the method's own."""
    is_std_normalised: bool = True
    """grpo: divide by the group's standard deviation; false only subtracts its mean."""
    clip: tuple[float, float] | None = (0.2, 0.2)
    """How far the ratio may go below and above 1; [0.2, 0.28] is clip-higher; null uses no ratio."""
    normalise: Literal["tokens", "sequence_means", "sequences"] = "tokens"
    """What an update is averaged over: all tokens, completions by their mean, or completions by their sum."""
    truncated: Literal["keep", "mask", "drop"] = "mask"
    """Completions cut by the limit: like any other; in the baseline, not trained; or out of the baseline too."""
    sampler_cap: float | None = Field(2.0, ge=1)
    """Largest weight that corrects the sampler to the trainer; null leaves the correction out."""
    kl_to_base: float = Field(0.0, ge=0)
    """Weight of the KL to the model the run began with; above 0 that model is held in memory too."""
    refill_draws: Positive = 1
    """Most draws in a round to replace groups whose rewards are all the same by the next prompts; 1 replaces none."""

    @model_validator(mode="after")
    def _one_divisor(self) -> "PolicyGradientStage":
        if self.train.divisor != "targets":
            raise ValueError(f"train.divisor={self.train.divisor} is for likelihoods; here normalise says it")
        if self.method in ("rloo", "grpo") and self.rollout.n < 2:
            raise ValueError(f"{self.method} compares the completions of a prompt: rollout.n must be at least 2")
        return self


def signal_of(settings: PolicyGradientStage, bench: "Workbench") -> PolicyGradient:
    """The objective that the settings name."""
    options = dict(DEFAULTS[settings.method])
    if settings.method == "grpo" and not settings.is_std_normalised:
        options["advantage"] = "grpo_no_std"
    if settings.reward is not None:
        options["reward"] = settings.reward
    base = bench.base_scorer() if settings.kl_to_base > 0 else None
    names = ("clip", "normalise", "truncated", "sampler_cap")
    return PolicyGradient(**options, **{n: getattr(settings, n) for n in names}, kl_coef=settings.kl_to_base, base=base)


def build(settings: PolicyGradientStage, bench: "Workbench") -> Stage:
    """Draw groups, judge them, and update once (or as `train` says) on each draw."""
    drawn, signal = drawn_of(settings, bench), signal_of(settings, bench)
    source: Source = Judged(drawn, bench.verifier(settings.verifier))
    if settings.refill_draws > 1:
        source = Refilled(source, drawn, is_useful=signal.is_useful, max_draws=settings.refill_draws)
    return stage_of(settings, bench, source, signal=signal, lr=LR)
