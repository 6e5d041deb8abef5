"""Rejection-sampling fine-tuning: sample, keep what the verifier accepts, fine-tune on it, again."""

from typing import TYPE_CHECKING, Literal

from tutelage.methods.card import Card
from tutelage.methods.family import Imitation, drawn_of, stage_of
from tutelage.methods.keeping import accepted_of
from tutelage.sources import Judged
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


class RejectionSampling(Imitation):
    """Settings of a rejection-sampling stage."""

    method: Literal["rejection_sampling"] = "rejection_sampling"
    name: str = "rejection_sampling"
    """The stage's name within a plan."""


def build(settings: RejectionSampling, bench: "Workbench") -> Stage:
    """`rounds` rounds of sampling, judging, keeping and training."""
    judged = Judged(drawn_of(settings, bench), bench.verifier(settings.verifier))
    return stage_of(settings, bench, accepted_of(judged, settings.keep, bench))
