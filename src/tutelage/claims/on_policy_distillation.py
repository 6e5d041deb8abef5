"""Claim 6: on-policy distillation removes the mismatch between training and inference.

Two experiments: a chain whose divergences are exact, and a small transformer that walks.

Dimension letters:  A, B  the last two tokens   V vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.walks import (
    SAMPLING,
    Learner,
    good_teacher,
    small_model,
    split_tasks,
    watched,
)
from tutelage.evals.teacher_check import compare_prefixes, excess_error
from tutelage.numerics.divergence import forward_kl, jsd, reverse_kl
from tutelage.numerics.logprobs import entropy
from tutelage.policies.teachers import InProcessTeacher
from tutelage.signals import HardTargets
from tutelage.signals.distribution import TeacherDistribution
from tutelage.sources import Drawn, Recorded
from tutelage.types import Task, seed_for


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is."""

    vocab: int = 12
    horizon: int = 24
    chain_steps: int = 200
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


# -- the chain ---------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: Mapping[str, Loss] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd.1": partial(jsd, beta=0.1, normalised=True),
    "jsd.5": partial(jsd, beta=0.5, normalised=True),
    "jsd.9": partial(jsd, beta=0.9, normalised=True),
}
RUNS = (*((loss, share) for loss in LOSSES for share in (0.0, 1.0)), ("rkl", 0.5))
"""(divergence, share of the student's own states)."""


def occupancy(probs_ABV: Tensor, horizon: int) -> Tensor:
    """(A, B): expected visits to each pair of last tokens, a step, from a uniform start."""
    vocab = probs_ABV.shape[-1]
    state_AB = torch.full((vocab, vocab), 1 / vocab**2, dtype=torch.float64)
    total_AB = torch.zeros_like(state_AB)
    for _ in range(horizon):
        total_AB += state_AB
        state_AB = torch.einsum("ab,abc->bc", state_AB, probs_ABV)
    return total_AB / horizon


def chain_student(loss: str, share_on: float, teacher_ABV: Tensor, size: Size) -> dict[str, float]:
    """A first-order student of a second-order teacher, trained on states visited by itself (this share) and by the
    teacher; no gradient through which states are visited."""

    def shown(student_BV: Tensor) -> Tensor:
        return student_BV.unsqueeze(0).expand_as(teacher_ABV)

    student_BV = torch.zeros(size.vocab, size.vocab, dtype=torch.float64, requires_grad=True)
    off_AB = occupancy(teacher_ABV.softmax(-1), size.horizon)
    optimizer = torch.optim.Adam([student_BV], lr=0.05)
    for _ in range(size.chain_steps):
        with torch.no_grad():
            on_AB = occupancy(shown(student_BV).softmax(-1), size.horizon)
        weight_AB = share_on * on_AB + (1 - share_on) * off_AB
        optimizer.zero_grad()
        (weight_AB * LOSSES[loss](shown(student_BV), teacher_ABV)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        on_AB = occupancy(shown(student_BV).softmax(-1), size.horizon)
        return {
            "rkl": float((on_AB * reverse_kl(shown(student_BV), teacher_ABV)).sum()),
            "entropy": float((on_AB * entropy(shown(student_BV))).sum()),
            "fkl_on_teacher": float((off_AB * forward_kl(shown(student_BV), teacher_ABV)).sum()),
        }


def chain(seed: int, size: Size) -> dict[str, float]:
    """Every divergence on both kinds of states, and what the orderings need."""
    g = torch.Generator().manual_seed(seed)
    teacher_ABV = 4.0 * torch.randn(size.vocab, size.vocab, size.vocab, dtype=torch.float64, generator=g)
    found = {run: chain_student(*run, teacher_ABV, size) for run in RUNS}
    kl = {run: f["rkl"] for run, f in found.items()}
    out = {f"chain_rkl_{loss}_{'on' if on == 1 else 'off' if on == 0 else 'half'}": v for (loss, on), v in kl.items()}
    order = [("fkl", 0.0), ("fkl", 1.0), ("rkl", 0.0), ("rkl", 0.5), ("rkl", 1.0)]
    falls = [kl[a] - kl[b] for a, b in pairwise(order)]
    by_beta = [kl["jsd.1", 1.0] - kl["jsd.5", 1.0], kl["jsd.5", 1.0] - kl["jsd.9", 1.0]]
    supervised, on_policy = found["fkl", 0.0], found["rkl", 1.0]
    out["chain_least_fall"] = min(falls)
    out["chain_least_fall_by_beta"] = min(by_beta)
    out["chain_least_gain_of_own_states"] = min(kl[loss, 0.0] - kl[loss, 1.0] for loss in LOSSES)
    out["chain_rkl_cut"] = 1 - on_policy["rkl"] / supervised["rkl"]
    out["chain_entropy_cut"] = 1 - on_policy["entropy"] / supervised["entropy"]
    out["chain_fkl_on_teacher_ratio"] = on_policy["fkl_on_teacher"] / supervised["fkl_on_teacher"]
    return out


# -- transformers ------------------------------------------------------------------------------

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


def walks(seed: int, size: Size) -> dict[str, float]:
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
    out = {"walk_teacher": teacher.pass_at(1, held), "walk_start": float(np.mean(starts))}
    out |= {f"walk_gain_{arm}": float(np.mean(v)) for arm, v in gains.items()}
    out |= {f"walk_gain_ratio_{arm}": float(np.mean(v)) for arm, v in ratios.items()}
    out |= {f"walk_mismatch_{arm}_percent": float(np.mean(v)) for arm, v in left.items()}
    out["walk_gain_over_supervised"] = out["walk_gain_forward_kl"] - out["walk_gain_supervised_kd"]
    out["walk_mismatch_removed_percent"] = (
        out["walk_mismatch_supervised_kd_percent"] - out["walk_mismatch_forward_kl_percent"]
    )
    return out


def measure(seed: int, size: Size = Size()) -> Numbers:
    """Both experiments."""
    return {**chain(seed, size), **walks(seed, size)}


CLAIM = Claim(
    name="on_policy_distillation",
    number=6,
    line="on-policy distillation fixes the fixed data set's mismatch between training and inference",
    source="Agarwal et al. 2023 (GKD), arXiv:2306.13649: gain ratio 1.9 on GSM8K; ExAccErr of arXiv:2204.01171",
    design=(
        "A first-order student of a second-order Markov teacher (12 tokens, sharp), states weighed by their exact "
        "occupancy over 24 steps: predicted order of KL(student || teacher) on the student's own sequences: forward "
        "KL on the teacher's states > on its own > reverse KL on the teacher's > half and half > on its own; it falls "
        "with beta 0.1, 0.5, 0.9 of the normalised JSD on its own states; against supervised forward KL, on-policy "
        "reverse KL cuts it by 30% or more and costs 25% or more of the entropy. A transformer of 32 x 2 on grid "
        "walks, 150 tasks with one teacher completion each, an initial student from SFT on them; then 60 updates of "
        "32 trajectories by SeqKD and supervised KD (forward KL, the fixed completions) or on-policy (forward KL, "
        "reverse KL on own walks of the same tasks). As GKD takes it: the gain in pass@1 on held-out tasks over the "
        "initial student, divided by the mean gain of the fixed-data arms. Predicted for on-policy forward KL, which "
        "differs from supervised KD in nothing but the data: ratio above 1, a larger gain than supervised KD, and "
        "less ExAccErr at 4 tokens."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="chain_least_fall", what="chain: least step down the predicted order, nats", above=0.0),
        Prediction(name="chain_least_fall_by_beta", what="chain: least fall with beta, nats", above=0.0),
        Prediction(name="chain_rkl_cut", what="chain: share of the reverse KL cut on-policy", above=0.3),
        Prediction(name="chain_entropy_cut", what="chain: share of the entropy it costs", above=0.25),
        Prediction(name="walk_gain_ratio_forward_kl", what="walks: gain ratio of on-policy over fixed data", above=1.0),
        Prediction(
            name="walk_gain_over_supervised", what="walks: pass@1, on-policy minus supervised forward KL", above=0.0
        ),
        Prediction(
            name="walk_mismatch_removed_percent",
            what="walks: ExAccErr, supervised minus on-policy, in per cent",
            above=0.0,
        ),
    ),
    minutes=4.0,
)
