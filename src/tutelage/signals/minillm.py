"""MiniLLM: the exact single-step reverse KL plus a policy gradient for what each token does to the rest.

Dimension letters:  C  targets of a chunk   V  vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from tutelage.errors import ConfigError
from tutelage.numerics.advantages import future_sums
from tutelage.numerics.logprobs import target_logprobs
from tutelage.numerics.policy_gradient import clipped_ratio_loss, sampler_weight
from tutelage.signals.base import Divisor
from tutelage.signals.distribution import DivergenceLoss, TeacherDistribution
from tutelage.signals.routing import View
from tutelage.signals.sampled import behaviour_scores, gap_stats, is_fixed, student_scores, teacher_scores
from tutelage.signals.shapes import shaped
from tutelage.types import Draw, Targets, Trajectory


class MiniLLM(TeacherDistribution):
    """Gradient of the sequence's reverse KL, in two parts.

    loss_t = KL(student || teacher at t) + w_t * clipped(p_student / p_old) * future_t

    The first part is exact over the vocabulary. The second weighs each sampled token by the log ratios after it:
    future_t = mean over t' > t of (log p_old - log p_teacher)(t') with `length_norm`, their sum without.
    w_t = p_old / p_sampler corrects for the sampler: exactly 1 for the student's own draw, and the per-step
    importance weight (the product over earlier steps left out) for a teacher-mixed one (`TeacherMixedSampler`).

    Args:
        teacher: one or several teachers in process that do not change.
        length_norm: mean instead of sum. The sum is the exact gradient on-policy; the mean keeps long answers from
            outweighing everything (without it the published scores fall by a third) and is no divergence's gradient.
        clip: how far the ratio may go below and above 1.
        sampler_cap: largest w_t. A sampler with teacher share a needs at most 1 / (1 - a).

    Source:
        Gu et al. 2023, arXiv:2306.08543, section 2.2. The pretraining loss they add is another source's hard targets.
        Their code applies w_t to the second part only, as here, and includes the token's own log ratio in its future
        although the first part has it; here the future begins after the token, as in the paper.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        length_norm: bool = True,
        clip: tuple[float, float] = (0.2, 0.2),
        sampler_cap: float = 2.0,
        divisor: Divisor = "targets",
        view: View | None = None,
    ) -> None:
        super().__init__(teacher, "reverse_kl", t_squared=False, divisor=divisor, view=view)
        if not self.is_live or not all(is_fixed(t) for t in self.router.teachers):
            raise ConfigError(
                "MiniLLM needs teachers in process whose weights do not change: its first part is over the whole "
                "vocabulary, and its second needs their scores before the first update"
            )
        self.length_norm, self.clip, self.sampler_cap = length_norm, clip, sampler_cap
        self.loss = MiniLLMLoss(self)

    def prepare(self, draw: Draw, *, score_student: Callable[[Sequence[Trajectory]], list[Sequence[float]]]) -> Targets:
        targets = super().prepare(draw, score_student=score_student)
        rows = targets.rows
        old = student_scores(rows, score_student)
        behaviour = behaviour_scores(rows)
        teacher = teacher_scores(self.router, rows, [r.columns for r in rows])
        out = []
        for i, r in enumerate(rows):
            future = future_sums((old[i] - teacher[i]).tolist(), average=self.length_norm)
            extra = {"old_logprobs_C": old[i], "behaviour_logprobs_C": behaviour[i], "future_C": np.array(future)}
            out.append(replace(r, columns={**r.columns, **extra}))
        stats = {**targets.stats, **gap_stats(rows, old, behaviour, self.sampler_cap)}
        return Targets(rows=out, divisor=targets.divisor, stats=stats)


class MiniLLMLoss(DivergenceLoss):
    """Both parts for one chunk of targets."""

    def __init__(self, signal: MiniLLM) -> None:
        super().__init__(signal)
        self.minillm = signal

    def __call__(self, student_logits_CV: Tensor, targets_C: Mapping[str, Tensor]) -> Tensor:
        exact_C = super().__call__(student_logits_CV, targets_C)
        student_C = target_logprobs(shaped(student_logits_CV, targets_C), targets_C["target_ids_C"])
        old_C = targets_C["old_logprobs_C"]
        low, high = self.minillm.clip
        later_C = clipped_ratio_loss(student_C, old_C, -targets_C["future_C"], clip_low=low, clip_high=high)
        weight_C = sampler_weight(old_C, targets_C["behaviour_logprobs_C"], cap=self.minillm.sampler_cap)
        return exact_C + weight_C * later_C
