"""Rejection-sampling fine-tuning: sample, keep what the verifier accepts, fine-tune on it, again."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tutelage.methods.card import Card
from tutelage.methods.settings import (
    KeepSettings,
    Positive,
    RolloutSettings,
    Settings,
    TaskSettings,
    TrainSettings,
    VerifierSettings,
)
from tutelage.signals import HardTargets
from tutelage.sources import Accepted, Drawn, Judged
from tutelage.train.loop import Stage

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

CARD = Card(
    name="rejection_sampling",
    title="Rejection-sampling fine-tuning",
    what="Sample n completions from the model, keep what the verifier accepts, fine-tune on it, iterate.",
    source="Accepted(Judged(Drawn(student, n), verifier), keep)",
    signal="HardTargets",
    eats="Prompts and a verifier; the model's own accepted completions are the data.",
    policy="on-policy data, SFT update: the first-order special case of the policy gradient (reward in {0, 1})",
    when="An execution gap (pass@k well above pass@1), a verifier, and no stronger teacher.",
    gotcha=(
        "Positives only: the policy's entropy falls, gains are fast and then stop. Entropy and coverage are logged "
        "every round; when they fall, graduate to RL, whose real edge is leaving out groups whose rewards are all the "
        "same."
    ),
    cite=(
        "STaR arXiv:2203.14465",
        "ReST arXiv:2308.08998",
        "RAFT arXiv:2304.06767",
        "RFT arXiv:2308.01825",
        "arXiv:2504.11343",
    ),
)

LR, LORA_FACTOR = 3e-5, 10.0


class RejectionSampling(Settings):
    """Settings of a rejection-sampling stage."""

    method: Literal["rejection_sampling"] = "rejection_sampling"
    name: str = "rejection_sampling"
    """The stage's name within a plan."""
    tasks: TaskSettings
    verifier: VerifierSettings
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    keep: KeepSettings = Field(default_factory=KeepSettings)
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(epochs=2, schedule="constant"))
    rounds: Positive = 2
    """Times to sample, keep and train."""
    draw_from: str = "current"
    """Whose samples: current, base, stage:NAME, or another model."""
    start_from: str = "previous"
    """What each round trains: previous (RAFT, ReST) or base (STaR, ReST-EM, RFT)."""


def build(settings: RejectionSampling, bench: "Workbench") -> Stage:
    """`rounds` rounds of sampling, judging, keeping and training."""
    drawn = Drawn(
        bench.train_tasks(settings.tasks),
        n=settings.rollout.n,
        params=bench.sampling(settings.rollout),
        per_round=settings.rollout.prompts_per_round,
        chunk_rows=settings.rollout.chunk_rows,
    )
    return Stage(
        name=settings.name,
        source=Accepted(Judged(drawn, bench.verifier(settings.verifier)), bench.keep(settings.keep)),
        signal=HardTargets(divisor=settings.train.divisor),
        trainer=bench.trainer_settings(settings.train, lr=LR, lora_factor=LORA_FACTOR),
        rounds=settings.rounds,
        draw_from=settings.draw_from,
        start_from=settings.start_from,
    )
