"""Claim 1: SFT, distillation and rejection sampling are one objective; they differ in whose trajectories it gets."""

import ast
from dataclasses import replace
from pathlib import Path

from torch import Tensor

import tutelage
from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.tables import FirstIsEven, TableSampler, TableText, carried_out, questions
from tutelage.policies.table import TablePolicy
from tutelage.signals import HardTargets
from tutelage.sources import Accepted, Drawn, Judged, Keep, Recorded
from tutelage.train.loop import Stage
from tutelage.train.trainer import TrainerSettings
from tutelage.types import DrawContext, Group, SamplingParams, Source, Trajectory

VOCAB = 9
SETTINGS = TrainerSettings(lr=0.05, batch_size=8, epochs=2, max_tokens=64)
PARAMS = SamplingParams(max_new_tokens=6)


def accepted(author: str) -> Source:
    """What an author answers, and a verifier accepts."""
    drawn = Drawn(questions(VOCAB), author=author, n=8, params=PARAMS)
    return Accepted(Judged(drawn, FirstIsEven()), Keep(distinct=None))


def demonstrations(student: TablePolicy, seed: int) -> list[Group]:
    """The accepted answers as a person's demonstrations: no log-probabilities, no verdicts, nothing rejected."""
    ctx = DrawContext(
        seed=seed,
        stage=0,
        round=0,
        sampler=lambda name: TableSampler(student, author=name, version=""),
        text=TableText(),
    )
    groups = []
    for group in accepted("student").draw(ctx).groups:
        kept = tuple(_by_a_person(t) for t in group.trajectories if t.weight != 0)
        if kept:
            groups.append(replace(group, trajectories=kept))
    return groups


def _by_a_person(t: Trajectory) -> Trajectory:
    *prompt, answer = t.spans
    answer = replace(answer, author="human", logprobs=None, policy_version=None, sampling=None)
    return replace(t, spans=(*prompt, answer), verdict=None)


def imports_of_methods(package: Path) -> int:
    """Imports of a method, source, signal or verifier in the modules of the loop."""
    found = 0
    for path in sorted((package / "train").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            layers = {name.split(".")[1] for name in names if name.startswith("tutelage.")}
            found += bool(layers & {"methods", "sources", "signals", "verifiers"})
    return found


def measure(seed: int) -> Numbers:
    """Largest differences of the weights after two epochs, in float64."""
    student, other = TablePolicy(VOCAB, seed=seed), TablePolicy(VOCAB, seed=seed + 1000)

    def trained(source: Source, *, teacher: TablePolicy | None = None) -> Tensor:
        stage = Stage(name="only", source=source, signal=HardTargets(), trainer=SETTINGS)
        return carried_out([stage], student, seed, teacher=teacher)

    people = demonstrations(student, seed)
    tables = {
        "rejection_sampling": trained(accepted("student")),
        "sft": trained(Recorded(people)),
        "distillation": trained(accepted("teacher"), teacher=student),
        "other_teacher": trained(accepted("teacher"), teacher=other),
    }
    start = student.table_VD.detach()
    ours = tables["rejection_sampling"]

    def largest(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    return {
        "sft_minus_rejection_sampling": largest(tables["sft"], ours),
        "distillation_minus_rejection_sampling": largest(tables["distillation"], ours),
        "moved_from_start": largest(ours, start),
        "other_trajectories_minus_rejection_sampling": largest(tables["other_teacher"], ours),
        "trajectories": float(sum(len(g.trajectories) for g in people)),
        "imports_of_methods_in_the_loop": float(imports_of_methods(Path(tutelage.__path__[0]))),
    }


CLAIM = Claim(
    name="one_objective",
    number=1,
    line="SFT, distillation and rejection sampling differ only in whose trajectories they imitate",
    source="the chapter's opening",
    design=(
        "By construction: three runs through the library's loop, from one table in float64, with one signal (hard "
        "targets), two epochs. Rejection sampling draws from the student and keeps what a verifier accepts. SFT gets "
        "those answers as demonstrations of a person. Distillation draws from a teacher that happens to answer as "
        "the student would, and filters. Predicted: the weights after the last update are equal to the bit; another "
        "teacher's trajectories give other weights (so the comparison can fail); and no module of the loop imports a "
        "method, a source, a signal or a verifier."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="sft_minus_rejection_sampling", what="largest difference of a weight, SFT", below=1e-300),
        Prediction(
            name="distillation_minus_rejection_sampling",
            what="largest difference of a weight, distillation",
            below=1e-300,
        ),
        Prediction(name="moved_from_start", what="largest change by training", above=0.01),
        Prediction(
            name="other_trajectories_minus_rejection_sampling",
            what="largest difference with another teacher's trajectories",
            above=0.01,
        ),
        Prediction(name="imports_of_methods_in_the_loop", what="imports of a method in the loop", below=0.5),
    ),
    minutes=0.5,
)
