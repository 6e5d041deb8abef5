"""On-policy distillation: the student samples, the teacher grades every token."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tutelage.methods.card import Card
from tutelage.methods.on_policy_parts import monitors_of, signal_of, source_of
from tutelage.methods.settings import (
    DataSettings,
    Fraction,
    Positive,
    RolloutSettings,
    Settings,
    TaskSettings,
    TrainSettings,
    VerifierSettings,
)
from tutelage.methods.teacher_settings import (
    AdaptiveSettings,
    DivergenceSettings,
    PretrainingSettings,
    TeacherSettings,
    check_answers,
    check_sampled,
)
from tutelage.train.loop import Stage

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

CARD = Card(
    name="distill_on_policy",
    title="On-policy distillation",
    what="The student samples its own trajectories and the teacher grades them densely, at every token.",
    source="Drawn(student), or a share of student rollouts among recorded trajectories (GKD)",
    signal="TeacherDistribution(reverse KL by default), SampledLogRatio, or MiniLLM",
    eats="Prompts, and a teacher of the same vocabulary that is really better at the task.",
    policy="on: the prefixes are the student's own",
    when="An execution or exposure gap and a better teacher: it removes the mismatch between training and use.",
    gotcha="Needs a teacher close enough to grade the student's prefixes; entropy falls; efficiency is directional.",
    cite=("arXiv:2306.13649", "arXiv:2306.08543", "arXiv:2402.03898", "thinkingmachines.ai 2025", "arXiv:2505.09388"),
)

LR, LORA_FACTOR = 1e-5, 10.0


class DistillOnPolicy(Settings):
    """Settings of an on-policy distillation stage: many rounds of one update."""

    method: Literal["distill_on_policy"] = "distill_on_policy"
    name: str = "distill_on_policy"
    """The stage's name within a plan."""
    teacher: TeacherSettings
    tasks: TaskSettings | None = None
    """Questions the student answers, and the evaluation's."""
    verifier: VerifierSettings | None = None
    """Judges the answers of the evaluation; grading does not use it."""
    data: DataSettings | None = None
    """Recorded trajectories for the share of prompts that the student does not answer."""
    student_share: Fraction = 1.0
    """Share of prompts answered by the student (GKD's lambda); below 1 the rest comes from `data`."""
    adaptive: AdaptiveSettings | None = None
    """In place of student_share: a share that grows when validation gets worse, with replay (DistiLLM)."""
    teacher_mix: float = Field(0.0, ge=0, lt=1)
    """Share of the teacher in what every token is sampled from (MiniLLM: 0.2)."""
    pretraining: PretrainingSettings | None = None
    """Plain text to learn beside (MiniLLM's pretraining loss)."""
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=1, prompts_per_round=16))
    divergence: DivergenceSettings = Field(default_factory=lambda: DivergenceSettings(kind="reverse_kl"))
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(batch_size=None, schedule="constant"))
    rounds: Positive = 100
    """Times to sample, grade and update."""

    @model_validator(mode="after")
    def _fed(self) -> "DistillOnPolicy":
        share, needs_data = self.student_share, self.student_share < 1 or self.adaptive is not None
        if needs_data and self.data is None:
            raise ValueError(f"student_share={share:g} or adaptive needs data for the other prompts")
        if not needs_data and self.tasks is None:
            raise ValueError("on-policy distillation needs tasks: the prompts that the student answers")
        if self.adaptive is not None and share != 1:
            raise ValueError(f"adaptive sets the share itself: leave student_share out (it is {share:g})")
        if self.teacher_mix > 0 and not self.teacher.can_sample_with_student:
            raise ValueError("teacher_mix needs one teacher of its own in this process: no cache, hint, or by_task")
        rollout = self.rollout
        if self.teacher_mix > 0 and not (rollout.temperature == rollout.top_p == 1 and rollout.engine == "inprocess"):
            raise ValueError(
                "teacher_mix samples from both models' own distributions in this process: rollout.temperature and "
                f"rollout.top_p must be 1 and rollout.engine inprocess, got {rollout.temperature:g}, "
                f"{rollout.top_p:g} and {rollout.engine}"
            )
        check_answers(self.teacher, self.divergence)
        if share > 0 or self.adaptive is not None:
            check_sampled(self.teacher, self.divergence, rollout)
        return self


def build(settings: DistillOnPolicy, bench: "Workbench") -> Stage:
    """`rounds` rounds of sampling, grading and (by default) one update."""
    return Stage(
        name=settings.name,
        source=source_of(settings, bench),
        signal=signal_of(settings, bench),
        trainer=bench.trainer_settings(settings.train, lr=LR, lora_factor=LORA_FACTOR),
        rounds=settings.rounds,
        monitors=monitors_of(settings, bench),
    )
