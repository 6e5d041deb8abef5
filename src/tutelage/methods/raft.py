"""RAFT: the best of K samples of each prompt, from the policy as it is, round after round."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tutelage.methods.card import Card
from tutelage.methods.family import Imitation, drawn_of, stage_of
from tutelage.methods.keeping import accepted_of, keep_of
from tutelage.methods.settings import KeepSettings, Positive, RolloutSettings, TrainSettings
from tutelage.sources import Judged
from tutelage.train.loop import Stage

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

CARD = Card(
    name="raft",
    title="RAFT",
    what="Sample K completions of each prompt, fine-tune on the best of them by score, go on from there.",
    source="Accepted(Judged(Drawn(student, K), verifier), best_of=1)",
    signal="HardTargets",
    eats="Prompts and a verifier, best with a graded score.",
    policy="on-policy data, SFT update",
    when="A reward that ranks, and a policy whose samples differ.",
    gotcha=(
        "Best of K moves the policy by up to ln K - (K-1)/K nats a round and narrows it: early gains, then a plateau. "
        "With a score of 0 and 1 the best is the first accepted."
    ),
    cite=("Dong et al. 2023, arXiv:2304.06767", "Xiong et al. 2025, arXiv:2504.11343"),
)


class RAFT(Imitation):
    """Settings of a RAFT stage."""

    method: Literal["raft"] = "raft"
    name: str = "raft"
    """The stage's name within a plan."""
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=8))
    keep: KeepSettings = Field(
        default_factory=lambda: KeepSettings(distinct=None, best_of=1, cap=None, order="sampled")
    )
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(epochs=1, schedule="constant"))
    rounds: Positive = 8
    """Times to sample and train."""
    is_accepted_only: bool = True
    """Keep nothing of a prompt whose best sample was rejected; false keeps the best by score whatever the verdict."""


def build(settings: RAFT, bench: "Workbench") -> Stage:
    """`rounds` rounds of sampling, ranking, and training on the best."""
    keep = keep_of(settings.keep)
    if not settings.is_accepted_only and keep.min_score is None:
        keep = replace(keep, min_score=float("-inf"))
    judged = Judged(drawn_of(settings, bench), bench.verifier(settings.verifier))
    return stage_of(settings, bench, accepted_of(judged, settings.keep, bench, keep=keep))
