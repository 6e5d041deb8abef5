"""On-policy distillation from sampled tokens: the teacher's and the student's log-probability of what was sampled.

Dimension letters:  C  targets of a chunk   V  vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.collate import collate
from tutelage.data.pack import microbatches
from tutelage.errors import ConfigError, DataError
from tutelage.numerics.advantages import future_sums
from tutelage.numerics.logprobs import target_logprobs
from tutelage.numerics.policy_gradient import clipped_ratio_loss, sampled_reverse_kl, sampler_weight
from tutelage.signals.base import Divisor, check_divisor, rows_of
from tutelage.signals.estimators import check_pair
from tutelage.signals.health import Health
from tutelage.signals.routing import Router, View
from tutelage.signals.shapes import fresh_samples, shape_columns, shaped
from tutelage.types import Draw, TargetRow, Targets, Trajectory

ScoreStudent = Callable[[Sequence[Trajectory]], list[Sequence[float]]]


class SampledLogRatio:
    """Reverse KL by policy gradient: each sampled token is pushed by how much likelier the teacher found it.

    loss_t = w * (p_student / p_old) * sg(log p_student - log p_teacher + future_t),  w = min(p_old / p_sampler, cap)

    `old` is recomputed by the trainer before the first update of a draw. With `clip` the log ratio is taken under `old`
    and the ratio is clipped as in PPO; both forms have the reverse KL's gradient on the first update.
    Environment, prompt and template tokens are never graded: they are no targets.

    Args:
        teacher: one teacher, or task name -> teacher. Anything with `score(trajectories)`: in process, a server.
        estimator: "policy_gradient", or "k2" (half the squared log ratio, the same expected gradient).
        clip: None, or how far the ratio may go below and above 1, e.g. (0.2, 0.2).
        discount: a token's advantage also has the log ratios after it, each step discounted by this. 0 grades every
            token for itself; 1 is the gradient of the sequence's divergence.
        sampler_cap: largest weight that corrects the sampler to the trainer; None leaves the correction out.
        recompute: False takes the weights at the update as `old`: right, and one forward cheaper, only where every
            draw is used for one update.
        divisor: what a step is averaged over.
        view: what the teacher reads in place of each trajectory (`HintedPrompt`).

    Raises:
        ConfigError: an estimator whose expected gradient is not the reverse KL's, or a number out of range.

    Source:
        Thinking Machines 2025, "On-policy distillation" (discount 0, no clip); Gu et al. 2023 (MiniLLM),
        arXiv:2306.08543, equation 2 (discount 1).
    """

    def __init__(
        self,
        teacher: Any,
        *,
        estimator: str = "policy_gradient",
        clip: tuple[float, float] | None = None,
        discount: float = 0.0,
        sampler_cap: float | None = 2.0,
        recompute: bool = True,
        divisor: Divisor = "targets",
        view: View | None = None,
    ) -> None:
        check_pair("reverse_kl", estimator)
        check_divisor(divisor)
        self.router = Router(teacher, view)
        self.estimator, self.clip, self.discount = estimator, clip, discount
        self.sampler_cap, self.recompute, self.divisor = sampler_cap, recompute, divisor
        problems = self._problems()
        if problems:
            raise ConfigError(problems)
        self.health = Health(self.router.names, overlap_k=0)

    def _problems(self) -> list[str]:
        out = []
        if self.estimator not in ("policy_gradient", "k2"):
            out.append(
                f"SampledLogRatio works from sampled tokens; estimator={self.estimator!r} needs the teacher's "
                "distribution: use TeacherDistribution"
            )
        if not 0 <= self.discount <= 1:
            out.append(f"discount must be in [0, 1], got {self.discount}")
        if self.estimator == "k2" and (self.discount > 0 or self.clip is not None):
            out.append('k2 has no advantage to discount or clip: use estimator="policy_gradient"')
        if self.clip is not None and not (len(self.clip) == 2 and 0 <= self.clip[0] <= 1 and self.clip[1] >= 0):
            out.append(
                f"clip must be how far the ratio may fall (at most 1) and rise, e.g. (0.2, 0.2); got {self.clip}"
            )
        if self.clip is not None and not self.recompute:
            out.append("clip compares with log-probabilities before the first update: it needs recompute=true")
        if self.sampler_cap is not None and not self.sampler_cap >= 1:
            out.append(f"sampler_cap must be at least 1, got {self.sampler_cap}")
        moving = [n for n, t in zip(self.router.names, self.router.teachers, strict=True) if not is_fixed(t)]
        if moving and (self.discount > 0 or self.clip is not None):
            out.append(
                f"teacher {moving[0]!r} changes during a draw, so it is asked at every update; discount and clip need "
                "its scores beforehand: use discount=0 without clip, or a teacher that does not change"
            )
        if self.discount > 0 and not self.recompute:
            out.append("discount sums log ratios before the first update: it needs recompute=true")
        for name, t in zip(self.router.names, self.router.teachers, strict=True):
            if not hasattr(t, "score"):
                out.append(f"teacher {name!r} cannot score given tokens (it has no `score`): use TeacherDistribution")
        return out

    # -- Signal --------------------------------------------------------------------------------

    def prepare(self, draw: Draw, *, score_student: ScoreStudent) -> Targets:
        """Scores of student and teacher for every sampled token, and what follows from them.

        Raises:
            DataError: tokens whose sampler's log-probabilities are unknown, or sampled at a temperature that the
                teacher cannot answer at, or decoded greedily.
        """
        rows = rows_of(draw, self.divisor)
        self.router.prepare(draw, rows)
        fresh_samples(draw, rows)
        shapes = shape_columns(rows)
        columns = [
            {**r.columns, **self.router.columns(i, r.trajectory.num_targets), **shapes[i]} for i, r in enumerate(rows)
        ]
        old = student_scores(rows, score_student) if self.recompute else None
        behaviour = behaviour_scores(rows) if self.sampler_cap is not None else None
        teacher = None
        if all(is_fixed(t) for t in self.router.teachers):
            teacher = teacher_scores(self.router, rows, shapes)
        stats = {"data/num_rows": float(len(rows))}
        for i, c in enumerate(columns):
            if old is not None:
                c["old_logprobs_C"] = old[i]
            if behaviour is not None:
                c["behaviour_logprobs_C"] = behaviour[i]
            if teacher is not None:
                c["teacher_logprobs_C"] = teacher[i]
            if self.discount > 0 and old is not None and teacher is not None:
                c["future_C"] = np.array(future_sums((old[i] - teacher[i]).tolist(), discount=self.discount))
        stats |= gap_stats(rows, old, behaviour, self.sampler_cap)
        out = [replace(r, columns=c) for r, c in zip(rows, columns, strict=True)]
        return Targets(rows=out, divisor=self.divisor, stats=stats)

    def annotate(self, batch: Any) -> Mapping[str, Any]:
        """Scores of teachers that change during a draw."""
        if "teacher_logprobs_C" in batch.columns:
            return {}
        out_C = torch.zeros_like(batch.columns["weight_C"])
        for index, teacher in enumerate(self.router.teachers):
            rows = [_with_temperature(r, batch) for r in self.router.rows_for(batch, index)]
            for part in microbatches(rows, max_tokens=teacher.max_tokens, layout=teacher.layout):
                own = collate(part, layout=teacher.layout, dtype=out_C.dtype).to(out_C.device)
                out_C[own.columns["place_C"]] = teacher.target_logprobs(own).to(out_C)
        return {"teacher_logprobs_C": out_C}

    def loss(self, student_logits_CV: Tensor, targets_C: Mapping[str, Tensor]) -> Tensor:
        student_C = target_logprobs(shaped(student_logits_CV, targets_C), targets_C["target_ids_C"])
        teacher_C = targets_C["teacher_logprobs_C"].to(student_C.dtype)
        old_C = targets_C["old_logprobs_C"] if "old_logprobs_C" in targets_C else student_C.detach()
        self.health.add(student_C - teacher_C, targets_C)
        if self.estimator == "k2":
            ratio_C = (student_C.detach() - old_C).exp()
            loss_C = ratio_C * (student_C - teacher_C).square() / 2
        elif self.clip is None:
            future_C = targets_C.get("future_C")
            loss_C = sampled_reverse_kl(student_C, teacher_C, behaviour_logprobs_N=old_C, future_N=future_C)
        else:
            cost_C = old_C - teacher_C + targets_C.get("future_C", torch.zeros_like(teacher_C))
            loss_C = clipped_ratio_loss(student_C, old_C, -cost_C, clip_low=self.clip[0], clip_high=self.clip[1])
        weight_C = torch.ones_like(old_C)
        if self.sampler_cap is not None:
            weight_C = sampler_weight(old_C, targets_C["behaviour_logprobs_C"], cap=self.sampler_cap)
        used_C = weight_C * (targets_C["weight_C"] != 0) if "weight_C" in targets_C else weight_C
        self.health.share(teacher_C - student_C, used_C)
        return loss_C * weight_C

    def after_step(self, policy: Any) -> None:
        self.router.after_step(policy)

    def state(self) -> Mapping[str, Any]:
        return {"teachers": self.router.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.router.restore(state["teachers"])

    def save(self, folder: Path) -> None:
        """Tensors that belong to the state (an averaged teacher's weights)."""
        self.router.save(folder)

    def load(self, folder: Path) -> None:
        self.router.load(folder)

    def take_sums(self) -> dict[str, float]:
        """What the losses since the last call add up to, to be summed over processes and given to `metrics`."""
        return self.health.take_sums()

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The sampled estimate of the reverse KL (k1), by teacher and by position."""
        return self.health.metrics(sums)


def is_fixed(teacher: Any) -> bool:
    """True unless the teacher says that it changes during a run."""
    return bool(getattr(teacher, "is_fixed", True))


def student_scores(rows: Sequence[TargetRow], score_student: ScoreStudent) -> list[Any]:
    """The trainer's own log-probabilities before the first update; zeros for rows that are not trained."""
    own = [i for i, r in enumerate(rows) if r.is_trained]
    scores = score_student([rows[i].trajectory for i in own])
    return _spread(rows, own, scores)


def behaviour_scores(rows: Sequence[TargetRow]) -> list[Any]:
    """What the sampler reported, over targets.

    Raises:
        DataError: it is unknown for a trained trajectory, or its context was changed afterwards.
    """
    own, found = [], []
    for i, r in enumerate(rows):
        if not r.is_trained:
            continue
        behaviour = r.trajectory.behaviour_logprobs
        if behaviour is None:
            authors = sorted({s.author for s in r.trajectory.spans if s.is_trainable})
            raise DataError(
                f"trajectory {r.trajectory.id!r} (written by {', '.join(authors)}) has no log-probabilities of its "
                "sampler, or its context changed since: a policy gradient needs tokens that the student sampled. Draw "
                "from the student, or use TeacherDistribution, which takes anybody's tokens"
            )
        own.append(i)
        found.append([lp for lp, hit in zip(behaviour, r.trajectory.is_target, strict=True) if hit])
    return _spread(rows, own, found)


def teacher_scores(router: Router, rows: Sequence[TargetRow], shapes: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Every target's log-probability under its own teacher, at the temperature it was sampled at."""
    out: list[Any] = [np.zeros(r.trajectory.num_targets) for r in rows]
    for index, teacher in enumerate(router.teachers):
        own = [i for i, r in enumerate(rows) if router.teacher_of[i] == index and r.is_trained]
        temperature = [shapes[i]["temperature_C"] for i in own if "temperature_C" in shapes[i]]
        seen = [router.trajectories[i] for i in own]
        if not temperature:
            scores = teacher.score(seen)
        elif getattr(teacher, "scores_at_temperature", False):
            scores = teacher.score(seen, temperature=temperature)
        else:
            raise DataError(
                f"teacher {router.names[index]!r} answers at temperature 1 only, and tokens were sampled at "
                f"{max(t.max() for t in temperature):g}: sample at temperature 1, or use a teacher in process"
            )
        for i, row_scores in zip(own, scores, strict=True):
            out[i] = np.asarray(row_scores, dtype=np.float64)
            if len(out[i]) != rows[i].trajectory.num_targets or not np.isfinite(out[i]).all():
                raise DataError(
                    f"teacher {router.names[index]!r} must give one finite log-probability for each of the "
                    f"{rows[i].trajectory.num_targets} targets of trajectory {rows[i].trajectory.id!r}; got "
                    f"{len(out[i])}, of which {int(np.isfinite(out[i]).sum())} are finite"
                )
    return out


def gap_stats(rows: Sequence[TargetRow], old: Any, behaviour: Any, cap: float | None) -> dict[str, float]:
    """How far sampler and trainer are apart on the trained tokens, and how often the weight is cut."""
    if old is None or behaviour is None or cap is None:
        return {}
    gaps = [old[i] - behaviour[i] for i, r in enumerate(rows) if r.is_trained]
    gap = np.concatenate([*gaps, np.zeros(0)])
    if not gap.size:
        return {}
    return {
        "policy/mean_abs_sampler_gap_nats": float(np.abs(gap).mean()),
        "policy/frac_sampler_weights_cut": float((gap > np.log(cap)).mean()),
    }


def _spread(rows: Sequence[TargetRow], own: Sequence[int], values: Sequence[Sequence[float]]) -> list[Any]:
    out: list[Any] = [np.zeros(r.trajectory.num_targets) for r in rows]
    for i, v in zip(own, values, strict=True):
        out[i] = np.asarray(v, dtype=np.float64)
    return out


def _with_temperature(row: TargetRow, batch: Any) -> TargetRow:
    """The row with the temperature of each of its targets, where the batch has one."""
    if "temperature_C" not in batch.columns:
        return row
    temperature = batch.columns["temperature_C"].cpu().double().numpy()[row.columns["place_C"]]
    return replace(row, columns={**row.columns, "temperature_C": temperature})
