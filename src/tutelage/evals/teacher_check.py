"""Is the teacher better than the student at the task, and do the two look alike enough for it to teach?

Dimension letters:  L  targets of a trajectory   V  vocabulary   K  entries compared
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.collate import collate
from tutelage.errors import ConfigError
from tutelage.evals.result import Comparison, EvalResult, compare
from tutelage.numerics.divergence import forward_kl, reverse_kl
from tutelage.numerics.logprobs import at_least_float32
from tutelage.types import TargetRow, Trajectory


@dataclass(frozen=True, kw_only=True)
class PrefixComparison:
    """Student and teacher at the same prefixes."""

    num_tokens: int
    forward_kl: float
    """KL(teacher || student), nats a token."""
    reverse_kl: float
    """KL(student || teacher), nats a token."""
    student_mass_on_teacher_top_k: float
    teacher_mass_on_student_top_k: float
    frac_top_k_shared: float
    top_k: int
    forward_kl_by_position: tuple[float, ...]
    """Nats, mean over the trajectories that reach the position."""
    count_by_position: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TeacherReport:
    """What was measured before a distillation run."""

    gain: Comparison | None
    """Teacher minus student, pass@1 paired by task; None where neither was evaluated."""
    student: dict[str, Any] | None
    teacher: dict[str, Any] | None
    """pass@1 of each with its interval."""
    on_teacher: PrefixComparison | None
    on_student: PrefixComparison | None
    excess_error_percent: tuple[tuple[int, float], ...]
    """(length, ExAccErr): KL gathered on the student's own prefixes beyond what the teacher's prefixes explain."""
    is_exempt: bool
    """True for an average of the student's own weights, which cannot be better beforehand."""
    verdict: str
    """One sentence."""

    def to_json(self) -> dict[str, Any]:
        def prefixes(p: PrefixComparison | None) -> dict[str, Any] | None:
            if p is None:
                return None
            skip = ("forward_kl_by_position", "count_by_position")
            return {k: v for k, v in p.__dict__.items() if k not in skip}

        return {
            "verdict": self.verdict,
            "is_exempt": self.is_exempt,
            "pass@1": {"student": self.student, "teacher": self.teacher},
            "gain": None if self.gain is None else self.gain.to_json(),
            "on_teacher_prefixes": prefixes(self.on_teacher),
            "on_student_prefixes": prefixes(self.on_student),
            "excess_error_percent": [list(pair) for pair in self.excess_error_percent],
        }


def check_teacher(
    student: Any,
    teacher: Any,
    *,
    student_result: EvalResult | None,
    teacher_result: EvalResult | None,
    teacher_trajectories: Sequence[Trajectory] = (),
    student_trajectories: Sequence[Trajectory] = (),
    teacher_views: Sequence[Trajectory] | None = None,
    student_views: Sequence[Trajectory] | None = None,
    top_k: int = 16,
    is_exempt: bool = False,
    allow_worse: bool = False,
) -> TeacherReport:
    """Measure a teacher against its student before a run, and stop the run if it has nothing to teach.

    Args:
        student, teacher: `InProcessTeacher`s (`SelfTeacher(policy)` for the student); None where there are no logits.
        student_result, teacher_result: both evaluated on the same tasks; the teacher as it will be used (its hint, its
            system prompt).
        teacher_trajectories, student_trajectories: sampled by each; KL is compared at the prefixes of both.
        teacher_views, student_views: what the teacher reads in place of each trajectory (its hint); None: the same.
        top_k: entries whose mass is compared.
        is_exempt: the teacher is an average of the student's own weights, and is not asked to be better.
        allow_worse: report, and do not raise.

    Raises:
        ConfigError: the teacher's pass@1 is not above the student's; the message has both with their intervals.
    """
    gain = None
    if student_result is not None and teacher_result is not None:
        gain = compare(student_result, teacher_result, metric="pass@1", name="teacher - student")
    on_teacher = on_student = None
    if student is not None and teacher is not None:
        on_teacher = compare_prefixes(student, teacher, teacher_trajectories, views=teacher_views, top_k=top_k)
        on_student = compare_prefixes(student, teacher, student_trajectories, views=student_views, top_k=top_k)
    excess = excess_error(on_teacher, on_student) if on_teacher is not None and on_student is not None else ()
    report = TeacherReport(
        gain=gain,
        student=None if student_result is None else student_result.metric_json("pass@1"),
        teacher=None if teacher_result is None else teacher_result.metric_json("pass@1"),
        on_teacher=on_teacher,
        on_student=on_student,
        excess_error_percent=excess,
        is_exempt=is_exempt,
        verdict=_verdict(gain, is_exempt),
    )
    if not is_exempt and not allow_worse and (gain is None or not gain.gain.value > 0):
        raise ConfigError(f"{report.verdict} Choose a better teacher, or set teacher.allow_worse=true.")
    return report


def compare_prefixes(
    student: Any,
    teacher: Any,
    trajectories: Sequence[Trajectory],
    *,
    views: Sequence[Trajectory] | None = None,
    top_k: int = 16,
) -> PrefixComparison | None:
    """Both KLs and the overlap of top-k mass at every target of the trajectories; None if there are none.

    Args:
        student, teacher: with `hidden(batch)` and `output_layer` (`InProcessTeacher`).
    """
    sums: dict[str, float] = dict.fromkeys(("fkl", "rkl", "s_mass", "t_mass", "shared"), 0.0)
    by_position: dict[int, list[float]] = {}
    num_tokens = 0
    for i, t in enumerate(trajectories):
        if not t.num_targets:
            continue
        s_LV, t_LV = _logits(student, t), _logits(teacher, t if views is None else views[i])
        shared = min(s_LV.shape[1], t_LV.shape[1])
        s_LV, t_LV = s_LV[:, :shared], t_LV[:, :shared]
        fkl_L = forward_kl(s_LV, t_LV)
        k = min(top_k, shared)
        s, p = s_LV.softmax(-1), t_LV.softmax(-1)
        s_top, t_top = s.topk(k, -1).indices, p.topk(k, -1).indices
        sums["fkl"] += float(fkl_L.sum())
        sums["rkl"] += float(reverse_kl(s_LV, t_LV).sum())
        sums["s_mass"] += float(s.gather(-1, t_top).sum())
        sums["t_mass"] += float(p.gather(-1, s_top).sum())
        sums["shared"] += float((s_top.unsqueeze(-1) == t_top.unsqueeze(-2)).any(-1).sum()) / k
        num_tokens += t.num_targets
        for position, nats in enumerate(fkl_L.tolist()):
            by_position.setdefault(position, []).append(nats)
    if num_tokens == 0:
        return None
    return PrefixComparison(
        num_tokens=num_tokens,
        forward_kl=sums["fkl"] / num_tokens,
        reverse_kl=sums["rkl"] / num_tokens,
        student_mass_on_teacher_top_k=sums["s_mass"] / num_tokens,
        teacher_mass_on_student_top_k=sums["t_mass"] / num_tokens,
        frac_top_k_shared=sums["shared"] / num_tokens,
        top_k=top_k,
        forward_kl_by_position=tuple(float(np.mean(by_position[i])) for i in range(len(by_position))),
        count_by_position=tuple(len(by_position[i]) for i in range(len(by_position))),
    )


def excess_error(on_teacher: PrefixComparison, on_student: PrefixComparison) -> tuple[tuple[int, float], ...]:
    """ExAccErr at lengths 1, 2, 4, ...: (R(l) - l e(l)) / (l e(l)), in per cent.

    R(l) = sum over the first l positions of KL(teacher || student) on the student's own prefixes; e(l) = its mean over
    the first l positions on the teacher's prefixes. 0 means that the student does on its own prefixes as on the
    teacher's; growth with l is compounding error.

    Source:
        Arora et al. 2022, arXiv:2204.01171, section 3; as used in Gu et al. 2023 (MiniLLM).
    """
    longest = min(len(on_teacher.forward_kl_by_position), len(on_student.forward_kl_by_position))
    out = []
    length = 1
    while length <= longest:
        gathered = sum(on_student.forward_kl_by_position[:length])
        expected = sum(on_teacher.forward_kl_by_position[:length])
        if expected > 0:
            out.append((length, 100 * (gathered - expected) / expected))
        length *= 2
    return tuple(out)


def _logits(model: Any, trajectory: Trajectory) -> Tensor:
    """(L, V) logits at one trajectory's targets, float32 or float64."""
    row = TargetRow(trajectory=trajectory, columns={"weight_C": np.ones(trajectory.num_targets)}, count=0.0)
    layer = model.output_layer
    with torch.no_grad():
        logits_LV: Tensor = layer.logits(model.hidden(collate([row], layout=model.layout)).to(layer.weight_VD))
    return logits_LV.to(at_least_float32(logits_LV))


def _verdict(gain: Comparison | None, is_exempt: bool) -> str:
    if is_exempt:
        return "The teacher is an average of the student's own weights: it is exempt from having to be better."
    if gain is None:
        return "The teacher must be shown to be better than the student: evaluate both on the same tasks."
    numbers = (
        f"the teacher's pass@1 is {gain.after:.3f} and the student's {gain.before:.3f} on {gain.gain.count} tasks, a "
        f"difference of {gain.gain.value:+.3f} (95% interval {gain.gain.low:+.3f} to {gain.gain.high:+.3f})"
    )
    if gain.gain.value <= 0:
        return f"The teacher is not better than the student at this task: {numbers}."
    if gain.gain.low <= 0:
        return f"The teacher may be better, within the noise: {numbers}."
    return f"The teacher is better: {numbers}."
