"""Supervised fine-tuning: maximum likelihood on demonstrations."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tutelage.methods.card import Card
from tutelage.methods.settings import DataSettings, Settings, TaskSettings, TrainSettings, VerifierSettings
from tutelage.signals import HardTargets
from tutelage.sources import Recorded
from tutelage.train.loop import Stage

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

CARD = Card(
    name="sft",
    title="Supervised fine-tuning",
    what="Maximum likelihood on prompt -> target; for agents the target is a whole trajectory.",
    source="Recorded(demonstrations)",
    signal="HardTargets",
    eats="Demonstrations by people, by a stronger model, or from an agent's logs.",
    policy="off: the targets are not the model's own samples",
    when="The model lacks a capability or a format; or a cold start before sampling from it or before RL.",
    gotcha=(
        "It never sees the model's own mistakes, so execution errors compound (up to eps T^2), and it overwrites other "
        "capabilities, more so in small models. Compare with `tutelage eval --against` on other tasks."
    ),
    cite=("Ouyang et al. 2022, arXiv:2203.02155", "Ross & Bagnell 2010", "arXiv:2507.10616"),
)

LR, LORA_FACTOR = 2e-5, 10.0


class SFT(Settings):
    """Settings of a supervised fine-tuning stage."""

    method: Literal["sft"] = "sft"
    name: str = "sft"
    """The stage's name within a plan."""
    data: DataSettings
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(epochs=3))
    start_from: str = "previous"
    """previous, base, or stage:NAME."""
    tasks: TaskSettings | None = None
    """Questions to evaluate on, before and after."""
    verifier: VerifierSettings | None = None
    """Judges the answers of the evaluation."""


def build(settings: SFT, bench: "Workbench") -> Stage:
    """One round over all demonstrations, for `train.epochs` epochs."""
    return Stage(
        name=settings.name,
        source=Recorded(bench.demonstrations(settings.data)),
        signal=HardTargets(divisor=settings.train.divisor),
        trainer=bench.trainer_settings(settings.train, lr=LR, lora_factor=LORA_FACTOR),
        start_from=settings.start_from,
    )
