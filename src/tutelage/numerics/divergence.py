"""Divergences between two next-token distributions, one value per position.

Student logits come first, teacher logits second. P is the teacher's distribution, Q the student's; everything is
in nats, natural logarithm, computed in float32 or float64 whatever the input. Gradients reach the student only.

Dimension letters:
  B  sequences      T  positions      V  vocabulary      K  teacher's top-k entries
Every function takes any number of leading axes: `_BTV` is the usual case, `_CV` (targets of a chunk) works the same.

Infinite logits: an entry with probability 0 contributes 0 by continuity, in value and gradient. Forward KL is +inf
where the teacher has mass and the student's logit is -inf, with the finite gradient p_S - p_T. Reverse KL is +inf
where the student has mass and the teacher's logit is -inf; no finite gradient exists there, so that position's
gradient is 0 and its value says why. Jensen-Shannon and the skewed forms are always finite.

The gradients are written out by hand: half the memory of what autograd keeps, and no nan from an unused branch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ConfigError, DataError
from tutelage.numerics.logprobs import at_least_float32, target_logprobs

Kernel = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(student_logprobs, teacher_logprobs, want_gradient) -> (value, d value / d student logits)."""

_FLOOR = -1e4
"""Stands for log 0 where the factor in front of it is exactly 0: 0 * -inf would be nan."""
_NEAR = 0.05
"""A mixture with less of one distribution than this is computed from the other one."""
_LARGEST_RATIO = 80.0
"""Nats; stands for the log of a larger ratio of probabilities: what depends on it has a factor of e^-80."""


def forward_kl(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor) -> Tensor:
    """KL(teacher || student) at every position: large where the student misses a teacher mode.

    kl[b, t] = sum_v p_T(v) * (log p_T(v) - log p_S(v)),   p = softmax(logits), natural log.

    Args:
        student_logits_BTV: unnormalised scores of the model being trained.
        teacher_logits_BTV: unnormalised scores of the model being imitated, over the same vocabulary in the
            same order. Treated as a constant.

    Shapes:
        student_logits_BTV, teacher_logits_BTV: (B, T, V), any float dtype.
        returns kl_BT: (B, T), float32, or float64 if either input is.

    Units:
        Nats. Never negative beyond rounding; 0 where the two distributions are equal.

    Gradient:
        d kl[b, t] / d student_logits[b, t, v] = p_S(v) - p_T(v). None for the teacher.

    Raises:
        DataError: the two shapes differ.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2, at temperature 1. Their loss is the cross-entropy, which
        differs from this by the teacher's entropy, a constant; it is kept so that 0 means "already the same".

    >>> x = torch.tensor([[[0.0, 1.0]]])
    >>> forward_kl(x, x).item()
    0.0
    """
    return _divergence("forward_kl", student_logits_BTV, teacher_logits_BTV, _forward_kl)


def reverse_kl(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor) -> Tensor:
    """KL(student || teacher) at every position: large where the student puts mass the teacher would not.

    kl[b, t] = sum_v p_S(v) * (log p_S(v) - log p_T(v))

    Shapes, Units, Raises: as `forward_kl`. +inf where the student has mass on a teacher logit of -inf.

    Gradient:
        d kl / d student_logits[v] = p_S(v) * (log p_S(v) - log p_T(v) - kl). None for the teacher.

    Source:
        Gu et al. 2023 (MiniLLM), arXiv:2306.08543, the exact single-step term; Agarwal et al. 2023 (GKD),
        arXiv:2306.13649, JSD(1).
    """
    return _divergence("reverse_kl", student_logits_BTV, teacher_logits_BTV, _reverse_kl)


def jsd(
    student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, beta: float = 0.5, *, normalised: bool = False
) -> Tensor:
    """Generalised Jensen-Shannon divergence at every position.

    M = beta * P_teacher + (1 - beta) * P_student
    JSD(beta) = beta * KL(P_teacher || M) + (1 - beta) * KL(P_student || M)

    Args:
        beta: the teacher's share of the mixture, in [0, 1].
        normalised: divide by beta * (1 - beta). The limits are then the forward KL (beta -> 0) and the reverse KL
            (beta -> 1), which 0 and 1 return, and the size hardly depends on beta, so a learning rate carries over.
            Without it beta of 0 or 1 gives 0 for any two distributions.

    Shapes, Raises: as `forward_kl`; ConfigError where beta is outside [0, 1].

    Units:
        Nats; at most log 2 at beta = 0.5 without normalisation.

    Gradient:
        d JSD / d student_logits[v] = (1 - beta) * p_S(v) * (log(p_S / M)(v) - KL(P_student || M)).

    Source:
        Agarwal et al. 2023 (GKD), arXiv:2306.13649, equation 1. The mixture is of probabilities, not of
        log-probabilities.
    """
    _check_share("beta", beta)
    if normalised and beta == 0:
        return _divergence("jsd", student_logits_BTV, teacher_logits_BTV, _forward_kl)
    if normalised and beta == 1:
        return _divergence("jsd", student_logits_BTV, teacher_logits_BTV, _reverse_kl)
    form = _jsd_near if min(beta, 1 - beta) < _NEAR else _jsd
    kernel = partial(form, beta=beta, scale=1 / (beta * (1 - beta)) if normalised else 1.0)
    return _divergence("jsd", student_logits_BTV, teacher_logits_BTV, kernel)


def skew_kl(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha * teacher + (1 - alpha) * student): forward KL whose gradient stays bounded.

    Args:
        alpha: the teacher's share of the mixture, in [0, 1]. 0 is the forward KL; 1 is 0 everywhere.

    Shapes, Units, Raises: as `forward_kl`; ConfigError where alpha is outside [0, 1]. At most -log(alpha) nats.

    Gradient:
        With r = p_S p_T / M: d / d student_logits[v] = (1 - alpha) * (p_S(v) * sum(r) - r(v)).

    Source:
        Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.
    """
    _check_share("alpha", alpha)
    kernel = _forward_kl if alpha == 0 else partial(_skew_kl_near if 1 - alpha < _NEAR else _skew_kl, alpha=alpha)
    return _divergence("skew_kl", student_logits_BTV, teacher_logits_BTV, kernel)


def skew_reverse_kl(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(student || (1 - alpha) * teacher + alpha * student): reverse KL whose gradient stays bounded.

    Args:
        alpha: the student's share of the mixture, in [0, 1]. 0 is the reverse KL; 1 is 0 everywhere.

    Shapes, Units, Raises: as `forward_kl`; ConfigError where alpha is outside [0, 1]. At most -log(alpha) nats.

    Gradient:
        With h = log(p_S / M) - alpha p_S / M: d / d student_logits[v] = p_S(v) * (h(v) - sum(p_S h)).

    Source:
        Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.
    """
    _check_share("alpha", alpha)
    form = _skew_reverse_kl_near if 1 - alpha < _NEAR else _skew_reverse_kl
    kernel = _reverse_kl if alpha == 0 else partial(form, alpha=alpha)
    return _divergence("skew_reverse_kl", student_logits_BTV, teacher_logits_BTV, kernel)


def hinton_loss(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    target_ids_BT: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 2.0,
) -> Tensor:
    """alpha * cross-entropy(target) + (1 - alpha) * T^2 * KL(teacher || student), both softened by T.

    T^2 keeps the soft term's gradient of one size as T grows (it falls as 1 / T^2 without it).

    Args:
        target_ids_BT: the hard targets of the cross-entropy, which is taken at temperature 1.
        alpha: share of the cross-entropy, in [0, 1].
        temperature: T, divides both models' logits in the soft term.

    Shapes:
        logits (B, T, V), target_ids_BT (B, T). returns (B, T), float32 or float64.

    Units:
        Nats at T = 1; the soft term is in T^2 nats otherwise.

    Raises:
        DataError: shapes differ. ConfigError: alpha outside [0, 1], or temperature not positive.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2. Papers differ in which term alpha stands before.
    """
    _check_share("alpha", alpha)
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature}: it divides the logits of both models")
    if alpha == 1:  # the soft term may be infinite
        return -target_logprobs(student_logits_BTV, target_ids_BT)
    soft_BT = forward_kl(student_logits_BTV / temperature, teacher_logits_BTV / temperature) * temperature**2
    if alpha == 0:
        return soft_BT
    return (1 - alpha) * soft_BT - alpha * target_logprobs(student_logits_BTV, target_ids_BT)


def top_k_kl(
    student_logits_BTV: Tensor,
    teacher_ids_BTK: Tensor,
    teacher_logprobs_BTK: Tensor,
    *,
    direction: str = "forward",
    teacher_tail_logprobs_BT: Tensor | None = None,
    min_tail: float = 1e-6,
) -> Tensor:
    """KL over K + 1 outcomes: the teacher's top-k tokens, and everything else as one.

    forward: sum_k p_T(k) log(p_T(k) / p_S(k)) + tail_T log(tail_T / tail_S)
    reverse: the same with T and S exchanged.
    The tail is what makes it a divergence: without it the student's mass outside the top-k is free.

    Args:
        teacher_ids_BTK: the teacher's most likely tokens, distinct.
        teacher_logprobs_BTK: their log-probabilities under the teacher's whole vocabulary. An entry of -inf is
            absent (for rows with fewer than K), whatever its id.
        direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher). Both are lower bounds of
            the divergence over the whole vocabulary, equal to it where the two tails have one shape.
        teacher_tail_logprobs_BT: log of the teacher's mass outside the top-k; None computes 1 - sum.
        min_tail: the teacher's tail in the reverse direction is at least this, as the stored probabilities may
            add up to 1 by rounding and an empty tail makes the divergence infinite.

    Shapes:
        student_logits_BTV: (B, T, V). teacher_ids_BTK: (B, T, K), integer. teacher_logprobs_BTK: (B, T, K).
        returns (B, T), float32 or float64.

    Units:
        Nats. Never negative beyond rounding (and `min_tail`, reverse).

    Gradient:
        As the whole-vocabulary form's, with the tail's share spread in proportion to the student's own tail.

    Raises:
        DataError: leading axes or K differ. ConfigError: another direction.
    """
    if direction not in ("forward", "reverse"):
        raise ConfigError(f'direction must be "forward" (teacher || student) or "reverse", got {direction!r}')
    if (
        teacher_ids_BTK.shape != teacher_logprobs_BTK.shape
        or teacher_ids_BTK.shape[:-1] != student_logits_BTV.shape[:-1]
        or teacher_ids_BTK.shape[-1] > student_logits_BTV.shape[-1]
    ):
        raise DataError(
            "top_k_kl needs teacher ids and log-probabilities of one shape (B, T, K), K at most V, beside student "
            f"logits (B, T, V); got ids {tuple(teacher_ids_BTK.shape)}, log-probabilities "
            f"{tuple(teacher_logprobs_BTK.shape)}, student {tuple(student_logits_BTV.shape)}. "
            "Cut the three to the same positions first."
        )
    dtype = at_least_float32(student_logits_BTV, teacher_logprobs_BTK)
    t_BTK = teacher_logprobs_BTK.detach().to(dtype)
    tail_BT = None if teacher_tail_logprobs_BT is None else teacher_tail_logprobs_BT.detach().to(dtype)
    kernel = partial(_top_k_kl, ids=teacher_ids_BTK, tail=tail_BT, reverse=direction == "reverse", min_tail=min_tail)
    value: Tensor = _HandGradient.apply(student_logits_BTV, t_BTK, kernel, dtype, torch.is_grad_enabled())
    return value


# -- plumbing ---------------------------------------------------------------------------------------------------


class _HandGradient(torch.autograd.Function):
    """Runs a kernel on log-probabilities; keeps only the finished gradient for backward."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logprobs: Tensor, kernel: Kernel, dtype: torch.dtype, is_grad: bool
    ) -> Tensor:
        want_gradient = is_grad and ctx.needs_input_grad[0]
        value, gradient = kernel(student_logits.to(dtype).log_softmax(-1), teacher_logprobs, want_gradient)
        ctx.student_dtype = student_logits.dtype
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0].unsqueeze(-1)).to(ctx.student_dtype), None, None, None, None


def _divergence(name: str, student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, kernel: Kernel) -> Tensor:
    if student_logits_BTV.shape != teacher_logits_BTV.shape:
        raise DataError(
            f"{name} needs student and teacher logits of one shape (B, T, V); "
            f"got student {tuple(student_logits_BTV.shape)}, teacher {tuple(teacher_logits_BTV.shape)}. "
            "If only V differs, one model pads its vocabulary: slice both to the shared V first, "
            "logits[..., :shared_vocabulary]."
        )
    dtype = at_least_float32(student_logits_BTV, teacher_logits_BTV)
    teacher_logprobs_BTV = teacher_logits_BTV.detach().to(dtype).log_softmax(-1)
    value_BT: Tensor = _HandGradient.apply(
        student_logits_BTV, teacher_logprobs_BTV, kernel, dtype, torch.is_grad_enabled()
    )
    return value_BT


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be in [0, 1], got {value}: it is a share of a mixture")


# -- kernels: s, t are log-probabilities of student and teacher, q = exp(s), p = exp(t) --------------------------


def _forward_kl(s: Tensor, t: Tensor, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    p = t.exp()
    log_ratio = (t - s).masked_fill_(p == 0, 0.0)
    value = log_ratio.mul_(p).sum(-1)
    return value, s.exp().sub_(p) if want_gradient else None


def _reverse_kl(s: Tensor, t: Tensor, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    q = s.exp()
    log_ratio = (s - t).masked_fill_(q == 0, 0.0)
    value = (q * log_ratio).sum(-1)
    if not want_gradient:
        return value, None
    gradient = log_ratio.sub_(value.unsqueeze(-1)).mul_(q)
    is_infinite = value.isinf()
    if bool(is_infinite.any()):
        gradient[is_infinite] = 0.0
    return value, gradient


def _jsd(s: Tensor, t: Tensor, want_gradient: bool, *, beta: float, scale: float) -> tuple[Tensor, Tensor | None]:
    p, q = t.exp(), s.exp()
    m = _log_mixture(p, q, beta)
    p_term = p.mul_(t.clamp_min(_FLOOR).sub_(m)).sum(-1)
    s_minus_m = s.clamp_min(_FLOOR).sub_(m)
    q_term = torch.mul(q, s_minus_m, out=m).sum(-1)
    value = (beta * p_term + (1 - beta) * q_term) * scale
    if not want_gradient:
        return value, None
    return value, s_minus_m.sub_(q_term.unsqueeze(-1)).mul_(q).mul_((1 - beta) * scale)


def _skew_kl(s: Tensor, t: Tensor, want_gradient: bool, *, alpha: float) -> tuple[Tensor, Tensor | None]:
    p, q = t.exp(), s.exp()
    m = _log_mixture(p, q, alpha)
    value = t.clamp_min(_FLOOR).sub_(m).mul_(p).sum(-1)
    if not want_gradient:
        return value, None
    r = p.mul_(q).div_(m.exp_())
    return value, (q.mul_(r.sum(-1, keepdim=True)).sub_(r)).mul_(1 - alpha)


def _skew_reverse_kl(s: Tensor, t: Tensor, want_gradient: bool, *, alpha: float) -> tuple[Tensor, Tensor | None]:
    p, q = t.exp(), s.exp()
    m = _log_mixture(p, q, 1 - alpha)
    h = s.clamp_min(_FLOOR).sub_(m)
    value = (q * h).sum(-1)
    if not want_gradient:
        return value, None
    h.sub_(q / m.exp_(), alpha=alpha)
    return value, h.sub_((q * h).sum(-1, keepdim=True)).mul_(q)


# Where the share c of one distribution O is small, the mixture M = N (1 + x), x = c (o/n - 1), is near the other, N:
# log(M / N) = log1p(x) would lose its digits as a difference of logarithms, all of them as c goes to 0.


def _near(n: Tensor, o: Tensor, c: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log(o / n), x, log1p(x) and KL(N || M) for M = (1 - c) N + c O, from log-probabilities."""
    d = (o.clamp_min(_FLOOR) - n.clamp_min(_FLOOR)).clamp_max(_LARGEST_RATIO)
    x = d.expm1().mul_(c)
    log_ratio = x.log1p()
    # The sum of n x = c (o - n) is 0: with it every term is positive, and small ones keep their digits.
    whole = (o.exp() - n.exp()).mul_(c).sub_(n.exp() * log_ratio)
    small = n.exp() * x.square() * (0.5 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x / 6))))
    kl = torch.where(x.abs() < _series_ends(x), small, whole).sum(-1)
    return d, x, log_ratio, kl


def _jsd_near(s: Tensor, t: Tensor, want_gradient: bool, *, beta: float, scale: float) -> tuple[Tensor, Tensor | None]:
    """`_jsd` for a beta near 0 (M is near the student) or near 1 (M is near the teacher)."""
    is_student = beta < 0.5
    c = beta if is_student else 1 - beta
    near, other = (s, t) if is_student else (t, s)
    d, _, log_ratio, near_kl = _near(near, other, c)
    other_minus_m = d - log_ratio
    other_kl = (other.exp() * other_minus_m).sum(-1)
    value = (c * other_kl + (1 - c) * near_kl) * scale
    if not want_gradient:
        return value, None
    s_minus_m, student_kl = (-log_ratio, near_kl) if is_student else (other_minus_m, other_kl)
    return value, (s_minus_m - student_kl.unsqueeze(-1)).mul_(s.exp()).mul_((1 - beta) * scale)


def _skew_kl_near(s: Tensor, t: Tensor, want_gradient: bool, *, alpha: float) -> tuple[Tensor, Tensor | None]:
    """`_skew_kl` for an alpha near 1: M is near the teacher."""
    _, x, _, value = _near(t, s, 1 - alpha)
    if not want_gradient:
        return value, None
    q, rest = s.exp(), x / (1 + x)
    return value, rest.sub_((q * rest).sum(-1, keepdim=True)).mul_(q).mul_(1 - alpha)


def _skew_reverse_kl_near(s: Tensor, t: Tensor, want_gradient: bool, *, alpha: float) -> tuple[Tensor, Tensor | None]:
    """`_skew_reverse_kl` for an alpha near 1: M is near the student."""
    _, _, log_ratio, value = _near(s, t, 1 - alpha)
    if not want_gradient:
        return value, None
    y = -log_ratio
    series = y.square() * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y / 720))))
    bend = torch.where(y.abs() < _series_ends(y), series, y.expm1() - y)
    h = y.mul_(1 - alpha).sub_(bend, alpha=alpha)
    q = s.exp()
    return value, h.sub_((q * h).sum(-1, keepdim=True)).mul_(q)


def _series_ends(x: Tensor) -> float:
    """Below this five terms of a series are as good as the dtype; above it the plain difference keeps its digits."""
    return 0.05 if x.dtype == torch.float32 else 1e-3


def _log_mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), kept off log 0: where both are 0 every factor before it is 0 too."""
    return (p * share).add_(q, alpha=1 - share).clamp_min_(torch.finfo(p.dtype).tiny).log_()


def _top_k_kl(
    s: Tensor, t: Tensor, want_gradient: bool, *, ids: Tensor, tail: Tensor | None, reverse: bool, min_tail: float
) -> tuple[Tensor, Tensor | None]:
    is_present = t > -math.inf
    # Absent entries may repeat a real id, so they are counted rather than written.
    in_top = torch.zeros_like(s).scatter_add_(-1, ids, is_present.to(s.dtype)) > 0
    s_tail = s.masked_fill(in_top, -math.inf).logsumexp(-1)
    s_top = s.gather(-1, ids).masked_fill(~is_present, -math.inf)
    # A row whose top-k is the whole vocabulary has no tail, whatever rounding says.
    has_tail = ~in_top.all(-1)
    if tail is None:
        tail = (1 - t.double().exp().sum(-1)).clamp_min(0).log().to(s.dtype)
    if reverse and min_tail > 0:
        tail = tail.clamp_min(math.log(min_tail))
    tail = tail.masked_fill(~has_tail, -math.inf)
    s_all = torch.cat([s_top, s_tail.unsqueeze(-1)], -1)
    t_all = torch.cat([t, tail.unsqueeze(-1)], -1)
    first, second = (s_all, t_all) if reverse else (t_all, s_all)
    weight = first.exp()
    log_ratio = (first - second).masked_fill_(weight == 0, 0.0)
    value = (weight * log_ratio).sum(-1)
    if not want_gradient:
        return value, None
    q = s.exp()
    if reverse:
        factor = (log_ratio[..., -1:] - value.unsqueeze(-1)).expand_as(q).contiguous()
        top_factor = log_ratio[..., :-1] - value.unsqueeze(-1)
        factor = _write_present(factor, ids, top_factor, is_present)
        gradient = q.mul_(factor)
        is_infinite = value.isinf()
        if bool(is_infinite.any()):
            gradient[is_infinite] = 0.0
        return value, gradient
    # Forward: q - p in the top-k; in the tail the teacher's mass follows the student's own shape.
    share = (s - torch.where(s_tail > -math.inf, s_tail, 0.0).unsqueeze(-1)).exp_().masked_fill_(in_top, 0.0)
    gradient = q.addcmul_(share, tail.exp().unsqueeze(-1), value=-1)
    return value, gradient.scatter_add_(-1, ids, -weight[..., :-1])


def _write_present(full: Tensor, ids: Tensor, values: Tensor, is_present: Tensor) -> Tensor:
    """`full` with `values` written at `ids`, present entries only (an absent one may repeat a real id)."""
    change = torch.where(is_present, values - full.gather(-1, ids), 0.0)
    return full.scatter_add_(-1, ids, change)
