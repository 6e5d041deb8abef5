"""ReST: one Grow, then several Improves on ever stricter parts of it. ReST-EM: accepted samples, from base, capped."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tutelage.methods.card import Card
from tutelage.methods.family import Imitation, drawn_of, stage_of
from tutelage.methods.keeping import accepted_of, budget_of, keep_of
from tutelage.methods.settings import KeepSettings, Positive, RolloutSettings, TrainSettings
from tutelage.sources import Judged, RisingThresholds
from tutelage.train.loop import Stage

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

CARD = Card(
    name="rest",
    title="ReST",
    what="Sample once (Grow), then fine-tune several times on what scores above a rising threshold (Improve).",
    source="RisingThresholds(Judged(Drawn(student, n), verifier))",
    signal="HardTargets",
    eats="Prompts and a verifier with a score of many values.",
    policy="on-policy data for the first Improve, the same samples again for the later ones",
    when="Sampling is dear and a graded score is there: the samples are used several times.",
    gotcha="A score that is only 0 or 1 makes every threshold the same one. More Grows drift to its errors.",
    cite=("Gulcehre et al. 2023, arXiv:2308.08998",),
)
EM_CARD = Card(
    name="rest_em",
    title="ReST-EM",
    what="Sample many, keep up to ten accepted answers a question, fine-tune the base model on them, iterate.",
    source="Accepted(Judged(Drawn(student, n), verifier), cap=10)",
    signal="HardTargets",
    eats="Questions and a verifier.",
    policy="on-policy data, SFT update from base",
    when="Rejection sampling of several rounds that should not drift: restarting keeps other abilities.",
    gotcha="Small question sets overfit by the second round. More rounds gained more than more samples, up to three.",
    cite=("Singh et al. 2023, arXiv:2312.06585",),
)


class ReST(Imitation):
    """Settings of a ReST stage."""

    method: Literal["rest"] = "rest"
    name: str = "rest"
    """The stage's name within a plan."""
    thresholds: tuple[float, ...] = Field((0.0, 0.5, 0.9), min_length=1)
    """One for each Improve, rising: what scores more is trained on."""
    are_quantiles: bool = False
    """Thresholds are shares of the draw's scores: 0.9 keeps the best tenth."""
    keep: KeepSettings = Field(default_factory=lambda: KeepSettings(cap=None))
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(epochs=1, schedule="linear"))
    rounds: Positive = 3
    """Improves in all: thresholds times the number of Grows. One Grow was best in the paper's human evaluation."""


class ReSTEM(Imitation):
    """Settings of a ReST-EM stage."""

    method: Literal["rest_em"] = "rest_em"
    name: str = "rest_em"
    """The stage's name within a plan."""
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=32, temperature=0.7))
    keep: KeepSettings = Field(default_factory=lambda: KeepSettings(cap=10, order="sampled"))
    rounds: Positive = 3
    """Times to sample and train."""
    start_from: str = "base"
    """What each round trains: base (the paper's) or previous."""


def build(settings: ReST, bench: "Workbench") -> Stage:
    """Grow rounds draw, and every round improves on the newest draw."""
    judged = Judged(drawn_of(settings, bench), bench.verifier(settings.verifier))
    source = RisingThresholds(
        judged,
        settings.thresholds,
        keep=keep_of(settings.keep),
        are_quantiles=settings.are_quantiles,
        budget=budget_of(settings.keep, bench),
    )
    return stage_of(settings, bench, source)


def build_em(settings: ReSTEM, bench: "Workbench") -> Stage:
    """`rounds` rounds of sampling, judging, keeping and training from base."""
    judged = Judged(drawn_of(settings, bench), bench.verifier(settings.verifier))
    return stage_of(settings, bench, accepted_of(judged, settings.keep, bench))
