"""RFT: distinct reasoning paths, pooled over rounds and samplers, with the gold solutions, from the first model."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tutelage.methods.card import Card
from tutelage.methods.family import Imitation, drawn_of, stage_of
from tutelage.methods.keeping import accepted_of
from tutelage.methods.settings import DataSettings, KeepSettings, Positive, RolloutSettings, TrainSettings
from tutelage.sources import Judged, Mixed, Paths, Pooled, Recorded, Replay
from tutelage.train.loop import Stage
from tutelage.types import Source

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

CARD = Card(
    name="rft",
    title="RFT",
    what="Sample many, keep one accepted answer of each reasoning path, add the gold solutions, train the first model.",
    source="Mixed(Replay(Accepted(Paths(Judged(Pooled(Drawn(sampler, n)), verifier)), distinct=key)), Recorded(gold))",
    signal="HardTargets",
    eats="Questions with answers and worked solutions; one or more models that were fine-tuned on them.",
    policy="off: pooled samples of one or more models, trained into the pretrained one",
    when="A small set of worked solutions that should go further.",
    gotcha="Distinct paths count. A strong sampler gives few (33B: 2.8 a question, no gain): pool weaker ones.",
    cite=("Yuan et al. 2023, arXiv:2308.01825",),
)


class RFT(Imitation):
    """Settings of an RFT stage."""

    method: Literal["rft"] = "rft"
    name: str = "rft"
    """The stage's name within a plan."""
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=100, temperature=0.7))
    keep: KeepSettings = Field(default_factory=lambda: KeepSettings(distinct="key", cap=None, order="farthest"))
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(epochs=3, schedule="cosine", batch_size=128))
    rounds: Positive = 1
    """Times to sample, pool and train."""
    start_from: str = "base"
    """What each round trains: base (the paper's) or previous."""
    samplers: tuple[str, ...] = ("student",)
    """Whose completions are pooled: student (see draw_from), base, or models by path or name."""
    gold: DataSettings | None = None
    """Worked solutions, trained on beside the samples; null adds none."""
    is_checked: bool = True
    """Reject accepted answers in which an equation is wrong by more than 0.001."""


def build(settings: RFT, bench: "Workbench") -> Stage:
    """Sample from every sampler, keep distinct paths, pool, add gold, train from base."""
    authors = {name: drawn_of(settings, bench, author=name) for name in settings.samplers}
    drawn: Source = Pooled(authors) if len(authors) > 1 else next(iter(authors.values()))
    judged = Paths(Judged(drawn, bench.verifier(settings.verifier)), check=settings.is_checked)
    source: Source = accepted_of(judged, settings.keep, bench)
    if settings.rounds > 1:
        source = Replay(source, distinct=settings.keep.distinct)
    if settings.gold is not None:
        source = Mixed({"samples": source, "gold": Recorded(bench.demonstrations(settings.gold))})
    return stage_of(settings, bench, source)
