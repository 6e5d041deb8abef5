"""A data stage as in large post-training runs: one large pass, strict filters, and SFT from base on what is left."""

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tutelage.methods.card import Card
from tutelage.methods.family import Imitation, drawn_of, stage_of
from tutelage.methods.keeping import accepted_of, selection_of, unstreamable
from tutelage.methods.settings import (
    DataSettings,
    KeepSettings,
    Positive,
    RolloutSettings,
    TextFilterSettings,
    TrainSettings,
)
from tutelage.sources import Judged, Mixed, Recorded, Streamed
from tutelage.sources.cleaned import Cleaned, TextRules, cleaned
from tutelage.train.loop import Stage
from tutelage.types import Source

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

CARD = Card(
    name="data_stage",
    title="Rejection-sampled data stage",
    what="Sample once from the best model so far, filter, mix with other data, and fine-tune the base model on it.",
    source="Mixed(Accepted(Judged(Drawn(stage or model, n), verifier), filters), Recorded(other data))",
    signal="HardTargets",
    eats="Prompts, a verifier, a model worth sampling (an RL checkpoint, the last round's best), and other data.",
    policy="off: another model's accepted samples, trained into base",
    when="Turning an RL checkpoint into clean data for a fresh model, with other abilities mixed in.",
    gotcha="The base forgets what is not in the mix. The sampler's habits (length, language) come along: filter them.",
    cite=("Llama 3, arXiv:2407.21783", "DeepSeek-R1, arXiv:2501.12948"),
)


class DataStage(Imitation):
    """Settings of a data stage."""

    method: Literal["data_stage"] = "data_stage"
    name: str = "data_stage"
    """The stage's name within a plan."""
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=16))
    keep: KeepSettings = Field(default_factory=lambda: KeepSettings(cap=4))
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(epochs=2, schedule="cosine"))
    rounds: Positive = 1
    """Passes."""
    gate: bool = False
    """Take the stage back if it made the model measurably worse on the probe set."""
    start_from: str = "base"
    """What is trained: base (the papers'), previous, or stage:NAME."""
    data: DataSettings | None = None
    """Other data in the mix (R1: 200k of 800k); null mixes nothing in."""
    filters: TextFilterSettings | None = None
    """Leave out answers in mixed languages, with long paragraphs or stray code (R1's filters); null reads no text."""
    is_streamed: bool = True
    """Sample, judge, choose and train through the disk, holding one chunk; false holds the whole draw."""
    is_unique: bool = False
    """Keep one of equal texts, whatever their prompt (streamed only)."""

    @model_validator(mode="after")
    def _streamable(self) -> "DataStage":
        problems = unstreamable(self) if self.is_streamed else []
        if problems:
            raise ValueError(f"{'; '.join(problems)}: set is_streamed=false")
        return self


def build(settings: DataStage, bench: "Workbench") -> Stage:
    """One pass of sampling and filtering, with the other data beside it."""
    drawn, verifier = drawn_of(settings, bench), bench.verifier(settings.verifier)
    other = bench.demonstrations(settings.data) if settings.data is not None else []
    rules = None
    if settings.filters is not None:  # the keep rules say what of verdicts, lengths and duplicates
        rules = TextRules(rejected=False, truncated=False, duplicates=False, **settings.filters.model_dump())
    if settings.is_streamed:
        finish = None if rules is None else partial(cleaned, rules=rules)
        return stage_of(settings, bench, Streamed(drawn, verifier, selection_of(settings), other=other, finish=finish))
    source: Source = Judged(drawn, verifier)
    if rules is not None:
        source = Cleaned(source, rules)
    source = accepted_of(source, settings.keep, bench)
    return stage_of(settings, bench, Mixed({"sampled": source, "data": Recorded(other)}) if other else source)
