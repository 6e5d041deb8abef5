"""Distillation from a teacher's next-token distribution, at every target.

Dimension letters:
  N, C  targets of a batch, of a chunk   V  vocabulary   E  teacher's hidden width   K  teacher's top-k entries
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.logit_cache import TopK, spread_tail
from tutelage.errors import ConfigError, DataError
from tutelage.numerics import divergence as kl
from tutelage.numerics.logprobs import target_logprobs
from tutelage.signals.base import Divisor, check_divisor, rows_of
from tutelage.signals.estimators import check_pair, number_problems
from tutelage.signals.health import Health
from tutelage.signals.routing import Router, View
from tutelage.signals.shapes import fresh_samples, sampled_shape, shape_columns, shaped
from tutelage.types import Draw, TargetRow, Targets, Trajectory

Columns = Mapping[str, Tensor]


class TeacherDistribution:
    """A divergence between the student's and the teacher's next-token distribution, averaged over targets.

    loss = alpha * CE(target) + (1 - alpha) * T^2 * D(teacher, student),  both distributions at temperature T

    The teacher's tokens, the student's own (on-policy) or anybody's may be the targets: this signal does not ask who
    wrote them. No gradient flows through sampling, so on-policy it is the gradient of the divergence at the prefixes
    that the student visits.

    Args:
        teacher: one teacher, or task name -> teacher ("*": all other tasks). A live one (`InProcessTeacher`) gives
            hidden states and its output layer; a cache or a server gives top-k columns.
        divergence: "forward_kl" is KL(teacher || student), "reverse_kl" KL(student || teacher), "jsd", "skew_kl",
            "skew_reverse_kl".
        estimator: "full" over the whole vocabulary; "top_k_tail" over the teacher's top-k and the rest as one.
        top_k: entries kept of a live teacher under "top_k_tail".
        beta: the teacher's share in the mixture of "jsd".
        normalised: divides "jsd" by beta (1 - beta): its limits are then forward and reverse KL, and a learning rate
            carries over between betas. Published GKD recipes do not (at beta 0.5 their loss is a quarter of this).
        skew: share mixed into the second argument of the skewed forms.
        alpha: share of the cross-entropy on the target tokens, taken at temperature 1.
        temperature: divides both models' logits. None: as each of the student's tokens was sampled (top-p as
            well), 1 for tokens of others.
        t_squared: multiply the divergence by T^2, which keeps the gradient's size as T grows (Hinton). GKD does not.
        divisor: what a step is averaged over.
        view: what the teacher reads in place of each trajectory (`HintedPrompt`); None: the trajectory itself.
        allow_shape_gap: let a given temperature differ from the one that the student's tokens were sampled at for this
            draw (all of it, or its share of a mixed one), and let them be greedy.
        overlap_k: entries compared for the overlap metric, at most what a cache or a server gives; 0 leaves it out.

    Raises:
        ConfigError: a pair of divergence and estimator whose gradient is another one's, or a number out of range.

    Source:
        Hinton et al. 2015, arXiv:1503.02531; Agarwal et al. 2023 (GKD), arXiv:2306.13649; Ko et al. 2024 (DistiLLM),
        arXiv:2402.03898.
    """

    def __init__(
        self,
        teacher: Any,
        divergence: str = "forward_kl",
        *,
        estimator: str = "full",
        top_k: int | None = None,
        beta: float = 0.5,
        normalised: bool = True,
        skew: float = 0.1,
        alpha: float = 0.0,
        temperature: float | None = None,
        t_squared: bool = True,
        divisor: Divisor = "targets",
        view: View | None = None,
        allow_shape_gap: bool = False,
        overlap_k: int = 16,
    ) -> None:
        check_pair(divergence, estimator, top_k=top_k)
        check_divisor(divisor)
        self.router = Router(teacher, view)
        self.divergence, self.estimator, self.top_k = divergence, estimator, top_k
        self.alpha, self.temperature, self.t_squared = alpha, temperature, t_squared
        self.divisor: Divisor = divisor
        self.allow_shape_gap = allow_shape_gap
        problems = _problems(self, beta=beta, normalised=normalised, skew=skew)
        if problems:
            raise ConfigError(problems)
        self.parameters = {"jsd": {"beta": beta, "normalised": normalised}}.get(
            divergence, {"alpha": skew} if divergence.startswith("skew") else {}
        )
        known = [t.k for t in self.router.teachers if t.form == "top_k" and getattr(t, "k", None)]
        self.health = Health(self.router.names, overlap_k=min(overlap_k, *known) if known else overlap_k)
        self.loss: Callable[..., Any] = DivergenceLoss(self)

    @property
    def is_live(self) -> bool:
        """True where teachers hand over hidden states, False where they give top-k columns."""
        return bool(self.router.teachers[0].form == "hidden")

    # -- Signal --------------------------------------------------------------------------------

    def prepare(self, draw: Draw, *, score_student: Callable[[Sequence[Trajectory]], list[Sequence[float]]]) -> Targets:
        """Rows with what leads to their teacher; a server's answers are fetched here, a cache's when needed.

        Raises:
            DataError: a task without a teacher, or tokens that the student sampled for this draw from another
                distribution than they are graded under.
        """
        rows = rows_of(draw, self.divisor)
        self.router.prepare(draw, rows)
        shapes = self._shapes(draw, rows)
        remote = self._fetched(rows) if not self.is_live else [{} for _ in rows]
        out = [
            replace(
                r,
                columns={**r.columns, **self.router.columns(i, r.trajectory.num_targets), **shapes[i], **remote[i]},
            )
            for i, r in enumerate(rows)
        ]
        return Targets(rows=out, divisor=self.divisor, stats={"data/num_rows": float(len(out))})

    def annotate(self, batch: Any) -> Mapping[str, Any]:
        self.health.begin_microbatch(batch.num_targets)
        if self.is_live:
            return {"teacher_hidden_CE": self.router.hidden(batch)}
        if "teacher_ids_CK" in batch.columns:
            return {}
        return self._cached(batch)

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
        """Divergence by teacher and by position, and the overlap of top-k mass, from summed sums."""
        return self.health.metrics(sums)

    # -- parts ---------------------------------------------------------------------------------

    def _shapes(self, draw: Draw, rows: Sequence[TargetRow]) -> list[dict[str, Any]]:
        """Columns of temperature and top-p, where the signal takes them from the samples."""
        own = [] if self.allow_shape_gap else fresh_samples(draw, rows)
        if self.temperature is None:
            columns = shape_columns(rows)
            if any("top_p_C" in c for c in columns) and self.divergence == "forward_kl":
                raise DataError(
                    "tokens were sampled with top-p below 1: the forward KL to a cut student is infinite. Sample with "
                    "top_p=1, use reverse_kl, jsd or a skewed form, or set a temperature and allow_shape_gap"
                )
            if any("temperature_C" in c for c in columns) and not self.is_live:
                raise DataError(
                    "tokens were sampled at another temperature than 1, and a stored or served teacher answers at one "
                    "temperature: sample at temperature 1, set the temperature of both, or use a teacher in process"
                )
            return columns
        for t in own:
            temperature_C, top_p_C = sampled_shape(t)
            if (temperature_C != self.temperature).any() or (top_p_C != 1).any():
                raise DataError(
                    f"on-policy tokens must be graded under the distribution they were sampled from; trajectory "
                    f"{t.id!r} was sampled at temperature {temperature_C.max():g}, top-p "
                    f"{top_p_C.min():g}, and the loss is at temperature {self.temperature:g}, top-p 1. Leave "
                    "temperature out to follow the samples, or set allow_shape_gap=true"
                )
        return [{} for _ in rows]

    def _fetched(self, rows: Sequence[TargetRow]) -> list[dict[str, Any]]:
        """Columns of teachers that are asked once a draw (servers)."""
        if all(getattr(t, "is_lazy", False) for t in self.router.teachers):
            return [{} for _ in rows]
        found: dict[int, TopK] = {}
        for index, teacher in enumerate(self.router.teachers):
            own = [i for i, r in enumerate(rows) if self.router.teacher_of[i] == index and r.is_trained]
            answers = teacher.top_k([self.router.trajectories[i] for i in own])
            found.update(zip(own, answers, strict=True))
        width = max((a.ids.shape[1] for a in found.values()), default=1)
        empty = TopK.empty()
        return [_top_k_columns(found.get(i, empty), width, r.trajectory.num_targets) for i, r in enumerate(rows)]

    def _cached(self, batch: Any) -> dict[str, Tensor]:
        """Columns of teachers that are read again for every microbatch (caches)."""
        parts: list[tuple[Any, TopK]] = []
        for index, teacher in enumerate(self.router.teachers):
            rows = self.router.rows_for(batch, index)
            for row, answer in zip(rows, teacher.top_k([r.trajectory for r in rows]), strict=True):
                used = row.columns["weight_C"] != 0
                parts.append((row.columns["place_C"][used], TopK(*(column[used] for column in answer))))
        width = max((p[1].ids.shape[1] for p in parts), default=1)
        dtype = batch.columns["weight_C"].dtype
        n, device = batch.num_targets, batch.token_ids_BT.device
        ids_CK = torch.zeros(n, width, dtype=torch.int64)
        logprobs_CK = torch.full((n, width), -torch.inf, dtype=dtype)
        tail_C = torch.full((n,), -torch.inf, dtype=dtype)
        for place, answer in parts:
            where = torch.from_numpy(place)
            ids_CK[where, : answer.ids.shape[1]] = torch.from_numpy(answer.ids.astype(np.int64))
            logprobs_CK[where, : answer.ids.shape[1]] = torch.from_numpy(answer.logprobs).to(dtype)
            tail_C[where] = torch.from_numpy(answer.tail).to(dtype)
        return {
            "teacher_ids_CK": ids_CK.to(device),
            "teacher_logprobs_CK": logprobs_CK.to(device),
            "teacher_tail_logprobs_C": tail_C.to(device),
        }


class DivergenceLoss:
    """The loss of one chunk of targets, in the form that `numerics.chunked` runs."""

    def __init__(self, signal: TeacherDistribution) -> None:
        self.signal = signal
        self.divergence: Callable[[Tensor, Tensor], Tensor] = partial(
            getattr(kl, signal.divergence), **signal.parameters
        )

    def prepare_chunk(self, columns_C: Columns) -> Columns:
        """The teacher's logits of this chunk in place of its hidden states; run without gradients."""
        if "teacher_hidden_CE" not in columns_C:
            return columns_C
        rest = {name: c for name, c in columns_C.items() if name != "teacher_hidden_CE"}
        hidden_CE = columns_C["teacher_hidden_CE"]
        teachers = self.signal.router.teachers
        if len(teachers) == 1:
            return {**rest, "teacher_logits_CV": _logits(teachers[0], hidden_CE)}
        logits_CV: Tensor | None = None
        for index in columns_C["teacher_C"].unique().tolist():
            own = columns_C["teacher_C"] == index
            part = _logits(teachers[index], hidden_CE[own])
            if logits_CV is None:
                logits_CV = part.new_empty(len(hidden_CE), part.shape[1])
            if part.shape[1] != logits_CV.shape[1]:
                raise DataError(
                    f"teachers must share one vocabulary; {self.signal.router.names[index]!r} has {part.shape[1]} "
                    f"entries and another {logits_CV.shape[1]}: give each the smallest as vocab_size"
                )
            logits_CV[own] = part.to(logits_CV.dtype)
        return {**rest, "teacher_logits_CV": logits_CV} if logits_CV is not None else rest

    def __call__(self, student_logits_CV: Tensor, targets_C: Columns) -> Tensor:
        s = self.signal
        if "teacher_hidden_CE" in targets_C:
            with torch.no_grad():
                targets_C = self.prepare_chunk(targets_C)
        soft_C, scale = self.soft(student_logits_CV, targets_C)
        s.health.add(soft_C, targets_C)
        if s.t_squared:
            soft_C = soft_C * scale
        if s.alpha == 0:
            return soft_C
        hard_C = -target_logprobs(student_logits_CV, targets_C["target_ids_C"])
        return s.alpha * hard_C + (1 - s.alpha) * soft_C

    def soft(self, student_logits_CV: Tensor, targets_C: Columns) -> tuple[Tensor, Tensor | float]:
        """The divergence of every target, and T^2."""
        s = self.signal
        if "teacher_logits_CV" not in targets_C:
            return self._from_columns(student_logits_CV, targets_C)
        teacher_CV = targets_C["teacher_logits_CV"].to(student_logits_CV.dtype)
        student_CV = _cut(student_logits_CV, teacher_CV.shape[1])
        s.health.compare(student_CV, teacher_CV)
        scale: Tensor | float = 1.0
        if s.temperature is not None:
            student_CV, teacher_CV = student_CV / s.temperature, teacher_CV / s.temperature
            scale = s.temperature**2
        else:
            student_CV = shaped(student_CV, targets_C)
            teacher_CV = shaped(teacher_CV, targets_C, with_top_p=False)
            scale = targets_C["temperature_C"].to(student_CV.dtype) ** 2 if "temperature_C" in targets_C else 1.0
        if s.estimator == "full":
            return self.divergence(student_CV, teacher_CV), scale
        assert s.top_k is not None
        teacher_CV = teacher_CV.log_softmax(-1)
        logprobs_CK, ids_CK = teacher_CV.topk(min(s.top_k, teacher_CV.shape[-1]), dim=-1)
        tail_C = teacher_CV.scatter(-1, ids_CK, -torch.inf).logsumexp(-1)
        return self._bucketed(student_CV, ids_CK, logprobs_CK, tail_C), scale

    def _from_columns(self, student_logits_CV: Tensor, targets_C: Columns) -> tuple[Tensor, Tensor | float]:
        s = self.signal
        ids_CK = targets_C["teacher_ids_CK"]
        logprobs_CK = targets_C["teacher_logprobs_CK"].to(student_logits_CV.dtype)
        tail_C = targets_C["teacher_tail_logprobs_C"].to(student_logits_CV.dtype)
        teacher = s.router.teachers[0]
        student_CV = _cut(student_logits_CV, getattr(teacher, "vocab_size", None))
        temperature = s.temperature if s.temperature is not None else 1.0
        student_CV = shaped(student_CV / temperature, {n: c for n, c in targets_C.items() if n == "top_p_C"})
        if s.estimator == "full":
            with torch.no_grad():
                teacher_CV = spread_tail(ids_CK, logprobs_CK, tail_C, student_CV.shape[-1])
            s.health.compare(student_CV, teacher_CV)
            return self.divergence(student_CV, teacher_CV), temperature**2
        # Shortened numbers need not add up to 1; an offset would shift the tail.
        total_C = torch.logaddexp(logprobs_CK.logsumexp(-1), tail_C)
        logprobs_CK, tail_C = logprobs_CK - total_C.unsqueeze(-1), tail_C - total_C
        s.health.compare_top_k(student_CV, ids_CK, logprobs_CK)
        return self._bucketed(student_CV, ids_CK, logprobs_CK, tail_C), temperature**2

    def _bucketed(self, student_CV: Tensor, ids_CK: Tensor, logprobs_CK: Tensor, tail_C: Tensor) -> Tensor:
        direction = "reverse" if self.signal.divergence == "reverse_kl" else "forward"
        return kl.top_k_kl(
            student_CV, ids_CK, logprobs_CK, direction=direction, teacher_tail_logprobs_BT=tail_C, min_tail=1e-12
        )


def _cut(logits_CV: Tensor, width: int | None) -> Tensor:
    """The first `width` entries; the very same tensor where that is all (a slice's gradient would be a copy)."""
    return logits_CV if width is None or width >= logits_CV.shape[-1] else logits_CV[:, :width]


def _logits(teacher: Any, hidden_CE: Tensor) -> Tensor:
    """A teacher's logits from hidden states padded to the widest teacher's; its bias and transform in float32."""
    layer = teacher.output_layer
    raw_CV: Tensor = hidden_CE[:, : layer.weight_VD.shape[1]].to(layer.weight_VD) @ layer.weight_VD.t()
    if layer.bias_V is None and layer.transform is None:
        return raw_CV
    full_CV: Tensor = raw_CV.to(torch.promote_types(raw_CV.dtype, torch.float32))
    if layer.bias_V is not None:
        full_CV = full_CV + layer.bias_V
    if layer.transform is not None:
        full_CV = layer.transform(full_CV)
    return full_CV


def _top_k_columns(answer: TopK, width: int, num_targets: int) -> dict[str, Any]:
    """One row's columns, padded to a common width with entries that are absent (-inf)."""
    ids = np.zeros((num_targets, width), dtype=np.int64)
    logprobs = np.full((num_targets, width), -np.inf)
    tail = np.full(num_targets, -np.inf)
    n, k = answer.ids.shape
    if n not in (0, num_targets):
        raise DataError(f"the teacher answered for {n} targets of a trajectory that has {num_targets}")
    ids[:n, :k], logprobs[:n, :k], tail[:n] = answer.ids, answer.logprobs, answer.tail
    return {"teacher_ids_CK": ids, "teacher_logprobs_CK": logprobs, "teacher_tail_logprobs_C": tail}


def _problems(s: TeacherDistribution, *, beta: float, normalised: bool, skew: float) -> list[str]:
    out = number_problems(s.divergence, alpha=s.alpha, beta=beta, normalised=normalised, skew=skew)
    if s.estimator not in ("full", "top_k_tail"):
        out.append(f"estimator={s.estimator!r} works from sampled tokens: use SampledLogRatio")
    if s.temperature is not None and not s.temperature > 0:
        out.append(f"temperature must be positive, got {s.temperature}: it divides the logits of both models")
    forms = {t.form for t in s.router.teachers}
    if len(forms) > 1:
        out.append(f"teachers must all be in process or all give top-k columns; got {', '.join(sorted(forms))}")
    elif forms == {"hidden"}:
        if s.estimator == "top_k_tail" and s.top_k is None:
            out.append('estimator="top_k_tail" needs top_k, the number of entries kept')
    else:
        out += _stored_problems(s)
    return out


def _stored_problems(s: TeacherDistribution) -> list[str]:
    """What a cache or a server cannot do."""
    out = []
    wanted = 1.0 if s.temperature is None else s.temperature
    for name, t in zip(s.router.names, s.router.teachers, strict=True):
        if s.estimator == "full" and not getattr(t, "spreads_tail", False):
            out.append(f'teacher {name!r} gives top-k columns, not the whole vocabulary: use estimator="top_k_tail"')
        has = getattr(t, "temperature", 1.0)
        if has != wanted:
            out.append(
                f"teacher {name!r} answers at temperature {has:g} and the loss is at {wanted:g}: what is left of "
                "the tail does not say how it would look at another temperature. Write the cache at the loss's"
            )
        k = getattr(t, "k", None)
        if s.divergence == "reverse_kl" and s.estimator == "top_k_tail" and k == 1:
            out.append(f"teacher {name!r} gives one token and a tail, which is no reverse KL: ask for 16 or more")
    return out
