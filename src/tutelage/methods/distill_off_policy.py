"""Off-policy distillation: the teacher's own trajectories, or anybody's with the teacher's distribution."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tutelage.methods.card import Card
from tutelage.methods.family import drawn_of
from tutelage.methods.grading import teacher_signal, told
from tutelage.methods.keeping import accepted_of
from tutelage.methods.settings import (
    DataSettings,
    KeepSettings,
    RolloutSettings,
    Settings,
    TaskSettings,
    TrainSettings,
    VerifierSettings,
)
from tutelage.methods.teacher_settings import DivergenceSettings, TeacherSettings, check_answers
from tutelage.signals import HardTargets
from tutelage.sources import Judged, Recorded
from tutelage.train.loop import Stage
from tutelage.types import Signal, Source

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

CARD = Card(
    name="distill_off_policy",
    title="Off-policy distillation",
    what="SFT on a teacher's completions, or on its whole next-token distribution (Hinton).",
    source="Drawn(teacher) or Recorded(...)",
    signal="HardTargets, or TeacherDistribution(forward KL by default)",
    eats="A teacher that is really better at the task, and prompts; or recorded trajectories and the teacher's logits.",
    policy="off: the prefixes are the teacher's or somebody's, not the student's",
    when="A knowledge or capability gap, and a better teacher. A cold start for on-policy distillation.",
    gotcha="Trained on prefixes it may never visit: the train/inference mismatch. The teacher is checked first.",
    cite=("Hinton et al. arXiv:1503.02531", "Kim & Rush arXiv:1606.07947", "arXiv:2412.19437", "arXiv:2512.02556"),
)

LR, LORA_FACTOR = 2e-5, 10.0


class DistillOffPolicy(Settings):
    """Settings of an off-policy distillation stage."""

    method: Literal["distill_off_policy"] = "distill_off_policy"
    name: str = "distill_off_policy"
    """Of the stage within a plan."""
    teacher: TeacherSettings
    data: DataSettings | None = None
    """Recorded trajectories; null lets the teacher answer the tasks."""
    tasks: TaskSettings | None = None
    """Questions the teacher answers, and the evaluation's."""
    verifier: VerifierSettings | None = None
    """Keeps only what it accepts of the teacher's answers; null keeps all."""
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=1))
    keep: KeepSettings = Field(default_factory=KeepSettings)
    divergence: DivergenceSettings | None = None
    """Learn the teacher's distribution; null learns its tokens (sequence level)."""
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(epochs=2))
    start_from: str = "previous"
    """previous, base, or stage:NAME."""

    @model_validator(mode="after")
    def _fed(self) -> "DistillOffPolicy":
        if self.data is None and self.tasks is None:
            raise ValueError("off-policy distillation needs recorded data, or tasks that the teacher answers")
        if self.data is not None and self.divergence is None:
            raise ValueError("data without divergence is plain SFT: use method sft, or set divergence.kind")
        if self.teacher.by_task and self.data is None:
            raise ValueError("only one teacher can answer tasks: teacher.by_task needs data, or distill_on_policy")
        if self.teacher.cache is not None and self.data is None:
            raise ValueError("teacher.cache holds answers to recorded data: set data.path, or leave the cache out")
        if self.divergence is not None:
            check_answers(self.teacher, self.divergence)
        return self


def build(settings: DistillOffPolicy, bench: "Workbench") -> Stage:
    """One round over the teacher's answers (or the recorded trajectories)."""
    divergence, divisor = settings.divergence, settings.train.divisor
    if settings.data is not None:
        source: Source = Recorded(bench.demonstrations(settings.data))
    else:
        assert settings.tasks is not None
        shown = told(settings.teacher)
        view = None if shown is None else lambda task, _: shown(task)
        source = drawn_of(settings, bench, author=bench.author_of(settings.teacher), view=view)
        if settings.verifier is not None:
            source = accepted_of(Judged(source, bench.verifier(settings.verifier)), settings.keep, bench)
    signal: Signal = HardTargets(divisor=divisor)
    if divergence:
        signal = teacher_signal(bench, settings.teacher, divergence, divisor, t_squared=True)
    return Stage(
        name=settings.name,
        source=source,
        signal=signal,
        trainer=bench.trainer_settings(settings.train, lr=LR, lora_factor=LORA_FACTOR),
        start_from=settings.start_from,
    )
