"""The loop: draw, set weights, train, watch. It never asks which method it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tutelage.train.session import Session
from tutelage.train.trainer import TrainerSettings
from tutelage.types import Monitor, MonitorReport, Signal, Source


@dataclass(kw_only=True)
class Stage:
    """One stage of a plan: whose trajectories, what is learned, and for how long."""

    name: str
    source: Source
    signal: Signal
    trainer: TrainerSettings
    rounds: int = 1
    draw_from: str = "current"
    """Whose samples "student" means: "current", "base", "stage:NAME", or a model's path or name."""
    start_from: str = "previous"
    """What each round's training starts from: "previous" (RAFT, ReST), "base" (STaR, ReST-EM, RFT), "stage:NAME"."""
    monitors: Sequence[Monitor] = field(default_factory=tuple)
    after: tuple[str, ...] | None = None
    """Carried out only if the stage before ended with one of these verdicts, e.g. "GRADUATE"; None always."""


def run_plan(plan: Sequence[Stage], session: Session) -> None:
    """Carry out a plan from the session's cursor to its end.

    A round is: draw (from `draw_from`), set weights and optimiser (to `start_from`), train on the draw, ask the
    monitors. SFT is one round of many epochs, on-policy distillation many rounds of one step, rejection sampling a few
    rounds of an epoch or two. A monitor that probes by updates may end a stage within a round.

    Raises:
        Interrupted: a stop was asked for; the state was saved and the run can be resumed.
    """
    cursor = session.cursor
    while cursor.stage < len(plan):
        stage = plan[cursor.stage]
        if not session.is_wanted(stage):
            session.skip()
            continue
        session.enter(stage)
        while cursor.round < stage.rounds:
            draw = session.draw(stage)
            if cursor.step == 0:
                session.start_from(stage, draw)
            targets = session.prepare(stage, draw)
            ending: Sequence[tuple[Monitor, MonitorReport]] = ()
            for record in session.trainer.steps(
                targets, stage.signal, stage.trainer, session.place(stage), done=cursor.step
            ):
                ending = session.after_step(stage, record)
                if ending:
                    break
            if ending:
                session.end_within_round(draw, ending)
                break
            if session.after_round(stage, draw, session.watch(stage, draw)):
                break
        session.leave(stage, is_last=cursor.stage + 1 == len(plan))


def describe(plan: Sequence[Stage]) -> list[dict[str, Any]]:
    """The plan as the two slots: for `--dry-run` and the report."""
    return [
        {
            "stage": s.name,
            "source": type(s.source).__name__,
            "signal": type(s.signal).__name__,
            "rounds": s.rounds,
            "draw_from": s.draw_from,
            "start_from": s.start_from,
        }
        for s in plan
    ]
