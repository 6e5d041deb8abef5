"""Claim 6 again: on-policy distillation of a small transformer, and the gain ratio as GKD takes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.walks import SAMPLING, Learner, good_teacher, small_model, split_tasks, watched
from tutelage.evals.teacher_check import compare_prefixes, excess_error
from tutelage.policies.teachers import InProcessTeacher
from tutelage.signals import HardTargets
from tutelage.signals.distribution import TeacherDistribution
from tutelage.sources import Drawn, Recorded
from tutelage.types import Task, seed_for


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is."""

    tasks: int = 150
    held_out: int = 150
    teacher_steps: int = 220
    start_steps: int = 100
    """Updates of the initial student, on the fixed data."""
    steps: int = 60
    batch: int = 32
    compared: int = 40
    """Tasks at whose prefixes student and teacher are compared."""
    lr: float = 1e-3
    students: tuple[tuple[int, int], ...] = ((32, 2),)
    """Width and layers; numbers are means over them."""


ON_POLICY = ("forward_kl", "reverse_kl")
BASELINES = ("seqkd", "supervised_kd")


def start_of(
    seed: int, width: int, layers: int, teacher: Learner, tasks: list[Task], size: Size
) -> tuple[Learner, Recorded]:
    """The initial student after SFT on the fixed data, and the data: one completion of the teacher for each task."""
    model = small_model(width=width, layers=layers, seed=seed_for(seed, width, layers) % 2**62)
    student = Learner(model, seed_for(seed, width, layers), teachers={"teacher": teacher.model})
    fixed = Recorded(student.draw(Drawn(tasks, author="teacher", params=SAMPLING)).groups)
    student.imitate(fixed.groups, lr=3e-3, steps=size.start_steps, batch_size=size.batch)
    return student, fixed


def distilled(arm: str, start: Learner, fixed: Recorded, teacher: Learner, tasks: list[Task], size: Size) -> Learner:
    """The student after as many updates, on as many trajectories, as every other arm."""
    pupil = start.copy()
    if arm in BASELINES:
        signal = HardTargets() if arm == "seqkd" else TeacherDistribution(watched(pupil, teacher), "forward_kl")
        epochs = round(size.steps * size.batch / len(fixed.groups))
        pupil.round(fixed, signal, lr=size.lr, batch_size=size.batch, epochs=epochs)
        return pupil
    own = Drawn(tasks, params=SAMPLING, per_round=size.batch)
    signal = TeacherDistribution(watched(pupil, teacher), arm)
    for _ in range(size.steps):
        pupil.round(own, signal, lr=size.lr)
    return pupil


def mismatch(student: Learner, teacher: Learner, tasks: list[Task]) -> float:
    """ExAccErr in per cent, at 4 tokens: KL(teacher || student) gathered on the
    student's own prefixes beyond what the teacher's prefixes explain."""
    here, there = (InProcessTeacher(x.copy().model) for x in (student, teacher))
    found = []
    for author in ("teacher", "student"):
        draw = student.draw(Drawn(tasks, author=author, params=SAMPLING, is_shuffled=False))
        found.append(compare_prefixes(here, there, list(draw)))
    on_teacher, on_student = found
    assert on_teacher is not None and on_student is not None
    return dict(excess_error(on_teacher, on_student))[4]


def gain_ratio(on_policy: float, fixed_data: Sequence[float]) -> float:
    """GKD's number for one student: the gain of on-policy distillation over the mean gain of the fixed-data methods,
    all over the same initial student. A mean gain below one point counts as one: a ratio to nothing says nothing."""
    return on_policy / max(float(np.mean(fixed_data)), 0.01)


def measure(seed: int, size: Size = Size()) -> Numbers:
    """Gains over the initial student, their ratio as GKD takes it, and the mismatch that is left."""
    train, held = split_tasks(seed, train=size.tasks)
    held = held[: size.held_out]
    teacher = good_teacher(seed, split_tasks(seed, train=400)[0], most=size.teacher_steps)
    ratios: dict[str, list[float]] = {arm: [] for arm in ON_POLICY}
    gains: dict[str, list[float]] = {arm: [] for arm in (*BASELINES, *ON_POLICY)}
    left: dict[str, list[float]] = {"supervised_kd": [], "forward_kl": []}
    starts = []
    for width, layers in size.students:
        start, fixed = start_of(seed, width, layers, teacher, train, size)
        starts.append(start.pass_at(1, held))
        for arm in gains:
            pupil = distilled(arm, start, fixed, teacher, train, size)
            gains[arm].append(pupil.pass_at(1, held) - starts[-1])
            if arm in left:
                left[arm].append(mismatch(pupil, teacher, train[: size.compared]))
        for arm in ON_POLICY:
            ratios[arm].append(gain_ratio(gains[arm][-1], [gains[name][-1] for name in BASELINES]))
    out = {"teacher": teacher.pass_at(1, held), "start": float(np.mean(starts))}
    out |= {f"gain_{arm}": float(np.mean(v)) for arm, v in gains.items()}
    out |= {f"gain_ratio_{arm}": float(np.mean(v)) for arm, v in ratios.items()}
    out |= {f"mismatch_{arm}_percent": float(np.mean(v)) for arm, v in left.items()}
    out["gain_over_supervised"] = out["gain_forward_kl"] - out["gain_supervised_kd"]
    out["mismatch_removed_percent"] = out["mismatch_supervised_kd_percent"] - out["mismatch_forward_kl_percent"]
    return out


CLAIM = Claim(
    name="on_policy_walks",
    number=6,
    line="the same with a small transformer: the gain of on-policy over fixed-data distillation, as GKD computes it",
    source="Agarwal et al. 2023 (GKD), arXiv:2306.13649: gain ratio 1.9 on GSM8K; ExAccErr of arXiv:2204.01171",
    design=(
        "A transformer of 32 x 2 on grid walks, 150 tasks with one teacher completion each, an initial student from "
        "SFT on them; then 60 updates of 32 trajectories by SeqKD and supervised KD (forward KL, the fixed "
        "completions) or on-policy (forward KL, reverse KL on own walks of the same tasks). As GKD takes it: the gain "
        "in pass@1 on held-out tasks over the initial student, divided by the mean gain of the fixed-data arms. "
        "Predicted for on-policy forward KL, which differs from supervised KD in nothing but the data: ratio above 1, "
        "a larger gain than supervised KD, and less ExAccErr at 4 tokens."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="gain_ratio_forward_kl", what="gain ratio of on-policy over fixed data", above=1.0),
        Prediction(name="gain_over_supervised", what="pass@1, on-policy minus supervised forward KL", above=0.0),
        Prediction(name="mismatch_removed_percent", what="ExAccErr, supervised minus on-policy, per cent", above=0.0),
    ),
    minutes=3.0,
)
