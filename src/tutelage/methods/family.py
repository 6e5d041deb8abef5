"""What the methods that learn from the student's own judged samples share: settings, and the stage they build."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from tutelage.methods.questions import checked_tasks
from tutelage.methods.settings import (
    GraduationThresholds,
    KeepSettings,
    Positive,
    ProbeSettings,
    RolloutSettings,
    Settings,
    TaskSettings,
    TrainSettings,
    VerifierSettings,
)
from tutelage.methods.watch import monitors_of
from tutelage.signals import HardTargets
from tutelage.sources import Drawn
from tutelage.train.loop import Stage
from tutelage.types import Signal, Source

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

LR, LORA_FACTOR = 3e-5, 10.0


class Sampling(Settings):
    """Settings of every stage that samples the student and judges what it says."""

    name: str
    """The stage's name within a plan."""
    tasks: TaskSettings
    verifier: VerifierSettings
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    train: TrainSettings = Field(default_factory=lambda: TrainSettings(epochs=2, schedule="constant"))
    rounds: Positive = 2
    """Times to sample and train; with until=graduation, at most."""
    gate: bool = True
    """Take a round back that made the model measurably worse on the probe set; two in a row end the stage."""
    until: Literal["rounds", "graduation"] = "rounds"
    """What ends the stage: its rounds, or the graduation monitor if that is sooner."""
    probe: ProbeSettings = Field(default_factory=ProbeSettings)
    graduation: GraduationThresholds = Field(default_factory=GraduationThresholds)


class Imitation(Sampling):
    """Settings of the rejection-sampling family: what is accepted is imitated."""

    keep: KeepSettings = Field(default_factory=KeepSettings)
    draw_from: str = "current"
    """Whose samples: current, base, stage:NAME, or another model."""
    start_from: str = "previous"
    """What each round trains: previous (RAFT, ReST) or base (STaR, ReST-EM, RFT)."""
    then: Literal["rl", "export"] | None = None
    """After graduation: rl goes on here with a policy gradient; export writes what other trainers need to go on."""
    then_after: tuple[Literal["GRADUATE", "STOP_NARROWING"], ...] = ("GRADUATE",)
    """then=rl: the verdicts that it follows."""
    rl: dict[str, Any] = Field(default_factory=dict)
    """then=rl: settings of that stage. Its questions, verifier and rollout are this stage's unless they are set."""

    @model_validator(mode="after")
    def _hands_over(self) -> "Imitation":
        if self.rl and self.then != "rl":
            raise ValueError(f"rl is set and then is {self.then!r}: set then=rl, or leave rl out")
        if self.then == "rl" and self.until != "graduation":
            raise ValueError("then=rl needs until=graduation: the monitor says when; for a fixed switch make a plan")
        return self


def drawn_of(settings: Any, bench: "Workbench", *, author: str = "student", **more: Any) -> Drawn:
    """The stage's own completions."""
    rollout = settings.rollout
    return Drawn(
        checked_tasks(settings, bench),
        author=author,
        n=rollout.n,
        params=bench.sampling(rollout),
        per_round=rollout.prompts_per_round,
        chunk_rows=rollout.chunk_rows,
        **more,
    )


def stage_of(
    settings: Any, bench: "Workbench", source: Source, *, signal: Signal | None = None, lr: float = LR
) -> Stage:
    """A stage on a source, with the gate and the monitor that the settings ask for."""
    return Stage(
        name=settings.name,
        source=source,
        signal=signal or HardTargets(divisor=settings.train.divisor),
        trainer=bench.trainer_settings(settings.train, lr=lr, lora_factor=LORA_FACTOR),
        rounds=settings.rounds,
        draw_from=getattr(settings, "draw_from", "current"),
        start_from=getattr(settings, "start_from", "previous"),
        monitors=monitors_of(settings, bench),
    )
