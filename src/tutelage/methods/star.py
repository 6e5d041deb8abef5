"""STaR: accepted answers, and for what was missed the answer as a hint that is taken out again; always from base."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tutelage.methods.card import Card
from tutelage.methods.family import Imitation, drawn_of, stage_of
from tutelage.methods.keeping import accepted_of
from tutelage.methods.settings import DataSettings, KeepSettings, Positive, RolloutSettings, TrainSettings
from tutelage.signals import with_hint
from tutelage.sources import Hinted, Judged
from tutelage.train.loop import Stage
from tutelage.types import Task

if TYPE_CHECKING:
    from tutelage.methods.workbench import Workbench

CARD = Card(
    name="star",
    title="STaR",
    what="Keep the rationales that end right; where none does, show the answer, keep what then ends right, hide it.",
    source="Accepted(Hinted(Judged(Drawn(student), verifier), verifier))",
    signal="HardTargets",
    eats="Questions with answers, and a verifier.",
    policy="on-policy data for what was solved; hinted rationales are off-policy: their context was changed",
    when="Questions the model solves sometimes, with known answers, and no worked solutions.",
    gotcha=(
        "A hinted rationale may argue backwards from the answer, or mention it. Right answers with wrong reasoning are "
        "kept, more so at higher temperatures. A model that does not solve above chance does not start."
    ),
    cite=("Zelikman et al. 2022, arXiv:2203.14465",),
)
HINT = "(Hint: the answer is {answer}. Explain how to get there as if you had not been told.)"


class STaR(Imitation):
    """Settings of a STaR stage."""

    method: Literal["star"] = "star"
    name: str = "star"
    """The stage's name within a plan."""
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=1, temperature=0.0))
    keep: KeepSettings = Field(default_factory=lambda: KeepSettings(cap=1))
    train: TrainSettings = Field(
        default_factory=lambda: TrainSettings(updates=40, updates_growth=1.2, schedule="linear", warmup=0.1)
    )
    rounds: Positive = 3
    """Outer loops."""
    start_from: str = "base"
    """What each round trains: base (the paper's) or previous."""
    hint: str | None = HINT
    """Put after the question of what was missed, with {answer} and the task's metadata; null rationalises nothing."""
    hint_n: Positive = 1
    """Completions of each missed question."""
    examples: DataSettings | None = None
    """Worked solutions, shown before each question in the first `examples_rounds` loops and taken out again."""
    examples_rounds: Positive = 1
    """Loops with the worked solutions."""


def build(settings: STaR, bench: "Workbench") -> Stage:
    """`rounds` loops of sampling, hinting, keeping, and training from base."""
    verifier = bench.verifier(settings.verifier)
    source: Judged | Hinted = Judged(drawn_of(settings, bench, view=_shown(settings, bench)), verifier)
    if settings.hint is not None:
        source = Hinted(
            source,
            verifier,
            hint=with_hint(settings.hint),
            params=bench.sampling(settings.rollout),
            n=settings.hint_n,
            chunk_rows=settings.rollout.chunk_rows,
        )
    return stage_of(settings, bench, accepted_of(source, settings.keep, bench))


def _shown(settings: STaR, bench: "Workbench") -> Callable[[Task, int], Task | None] | None:
    """The question behind the worked solutions, in the first loops."""
    if settings.examples is None:
        return None
    shown = [m for g in bench.demonstrations(settings.examples) for m in g.trajectories[0].messages]
    turns = [m for m in shown if m["role"] != "system"]

    def view(task: Task, loop: int) -> Task | None:
        if loop >= settings.examples_rounds:
            return None
        head = [m for m in task.messages if m["role"] == "system"]
        return replace(task, messages=(*head, *turns, *(m for m in task.messages if m["role"] != "system")))

    return view
