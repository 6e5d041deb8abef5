"""The protocols the parts meet at. A method is one `Source` (whose trajectories) and one `Signal` (what is learned).

Torch tensors appear here only as `Any`: this layer imports no torch, so verifier workers start in milliseconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tutelage.types.records import Completion, Draw, SampleRequest, SamplingParams, Task, Trajectory, Verdict


class Progress(Protocol):
    """Where long work reports how far it is. The command line draws it; tests pass `quiet`."""

    def start(self, what: str, total: int, unit: str) -> None: ...

    def advance(self, amount: int = 1, **numbers: float) -> None: ...

    def finish(self) -> None: ...


@runtime_checkable
class Sampler(Protocol):
    """Anything that can continue a prompt: a model in this process, a vLLM server, any compatible endpoint."""

    author: str
    """Goes into the spans it writes: "student", "teacher", or a model's name."""
    version: str
    """Which weights answer now."""

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """`n` completions for each request, in order. Equal requests and weights give equal answers."""


class Scorer(Protocol):
    """Anything that can say how likely given tokens are."""

    def score(self, trajectories: Sequence[Trajectory]) -> list[Sequence[float]]:
        """For each trajectory, nats per target token, in target order (length `num_targets`)."""


class Verifier(Protocol):
    """Accepts or rejects an answer, or says that it could not judge. Never raises on what a model wrote."""

    name: str
    version: str

    def judge(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """One verdict per trajectory of one task, in order."""


@dataclass
class DrawContext:
    """What a source may use to draw a round."""

    seed: int
    stage: int
    round: int
    sampler: Callable[[str], Sampler] | None = None
    """`sampler("student")` samples from what the stage's `draw_from` names; other names are the plan's teachers."""
    text: Any = None
    """`text.ChatText` of the student: renders tasks to prompts and messages to spans."""
    store: Path | None = None
    """Folder for the round's chunks, each committed whole (`data.RoundStore`); None keeps nothing."""
    kept: Path | None = None
    """Folder for what a source keeps over the rounds of a stage (a replay buffer); None keeps it in memory only."""
    progress: Progress | None = None
    processes: Any = None
    """`train.Processes`: chunks are shared out by index; None means one process."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """The newest validation scores, for sources whose rate depends on them."""
    record: Callable[[str, Mapping[str, Any]], None] = lambda event, fields: None
    """Writes one line of `events.jsonl`."""

    def inside(self, name: str) -> "DrawContext":
        """The context of one of several sources: its files lie in folders of that name."""
        folders = {n: folder / name for n in ("store", "kept") if (folder := getattr(self, n)) is not None}
        return replace(self, **folders)


@dataclass(frozen=True, kw_only=True)
class TargetRow:
    """One trajectory on its way through the model, with what its targets need and is not differentiated."""

    trajectory: Trajectory
    columns: Mapping[str, Any]
    """Name -> array over the trajectory's targets in order (first axis `num_targets`). Names carry their axes with C
    for the targets: `weight_C` (always there), `advantage_C`, `behaviour_logprobs_C`, `teacher_logprobs_CK`."""
    count: float
    """What this row adds to the step's divisor. A rejected trajectory adds its sampled tokens under "sampled"."""

    @property
    def is_trained(self) -> bool:
        """False where every weight is 0: the row counts in the divisor and is not sent through the model."""
        return any(w != 0 for w in self.columns["weight_C"])


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A draw, prepared by a signal: the rows to train on and how their losses are reduced."""

    rows: Sequence[TargetRow]
    divisor: str
    """What is counted in a step, over all processes, before its first backward: "targets", "sampled" or "sequences"."""
    stats: Mapping[str, float] = field(default_factory=dict)


class Source(Protocol):
    """Whose trajectories."""

    def draw(self, ctx: DrawContext) -> Draw: ...

    def state(self) -> Mapping[str, Any]:
        """JSON-able cursor, enough for `restore` to go on as if never stopped."""

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Signal(Protocol):
    """What is learned."""

    def prepare(self, draw: Draw, *, score_student: Callable[[Sequence[Trajectory]], list[Sequence[float]]]) -> Targets:
        """Once a draw: everything that is needed per target token and not differentiated.

        `score_student` gives the trainer's own log-probabilities of the targets under the weights before the
        first update, for signals whose ratios need them (DESIGN 3.9); the rest never call it.
        """

    def annotate(self, batch: Any) -> Mapping[str, Any]:
        """Once a microbatch, without gradients: further columns over its targets (a live teacher's scores)."""

    def loss(self, student_logits_CV: Any, targets_C: Mapping[str, Any]) -> Any:
        """(C,) nats per target for one chunk of targets; weights and divisor are applied by the caller.

        `targets_C` holds `target_ids_C` and every column of the rows, cut to the chunk.
        """

    def after_step(self, policy: Any) -> None:
        """Called after each optimiser step (an averaged teacher, an adaptive rate)."""

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one optimiser step reports; one line of `metrics.jsonl`."""

    stage: int
    round: int
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MonitorReport:
    """A monitor's opinion after a round or a probe."""

    verdict: str
    """For example CONTINUE, GRADUATE, STOP_NARROWING, NEED_TEACHER, FIX_PROMPTS, INSUFFICIENT, REGRESSED."""
    should_stop: bool = False
    """True ends the stage."""
    should_revert: bool = False
    """True sets weights and optimiser back to the round before."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able numbers behind the verdict."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """New validation scores, for sources whose rate depends on them."""


class Monitor(Protocol):
    """Watches a stage: probes, gates, graduation."""

    def after_round(self, draw: Draw, ctx: DrawContext) -> MonitorReport | None:
        """None: nothing was looked at."""

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...
