"""Policy-gradient terms: per-token losses from log-probabilities. One value per target, unweighted and unreduced.

Dimension letters:  N  targets (any leading axes work)

Three log-probabilities of one sampled token, never mixed up:
  student    under the weights being trained, differentiable
  old        recomputed by the trainer under the weights that sampled, before the first update of the draw
  behaviour  as the sampler reported it when it drew the token
Ratios of a clipped objective are student / old. The sampler's own error, old / behaviour, is a separate, truncated,
constant weight (`sampler_weight`): a bf16 sampler alone puts 8% of ratios outside [0.9, 1.1].

Losses are written so that minimising them maximises the objective.
"""

import math

import torch
from torch import Tensor

from tutelage.errors import ConfigError, DataError
from tutelage.numerics.logprobs import at_least_float32


def reinforce_loss(student_logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """-advantage * log p(token): the policy gradient without ratios, exact for tokens of the current policy.

    Shapes:
        student_logprobs_N, advantages_N: (N,). returns (N,), float32 or float64.

    Gradient:
        -advantage with respect to the log-probability. None to the advantage.

    Source:
        Williams 1992. With advantage 1 for accepted and 0 for rejected samples it is cross-entropy on what was
        accepted.
    """
    _check_shapes("reinforce_loss", student_logprobs_N, advantages_N)
    dtype = at_least_float32(student_logprobs_N)
    return -advantages_N.detach().to(dtype) * student_logprobs_N.to(dtype)


def clipped_ratio_loss(
    student_logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(s * A, clip(s, 1 - clip_low, 1 + clip_high) * A) with s = p_student / p_old, token by token.

    Args:
        old_logprobs_N: recomputed by the trainer before the first update, not the sampler's report.
        clip_low, clip_high: how far the ratio may fall and rise before its gradient stops; a larger `clip_high`
            leaves room for unlikely tokens ("clip-higher", 0.28).
        dual_clip: for negative advantages, the loss is at most dual_clip * |A|; None leaves it unbounded.

    Shapes:
        all (N,). returns (N,), float32 or float64.

    Gradient:
        To the student's log-probabilities only; 0 where the clip is active. At s = 1 it is `reinforce_loss`'s.

    Raises:
        ConfigError: clip_low not in [0, 1], clip_high negative, or dual_clip not above 1. DataError: shapes differ.

    Source:
        Schulman et al. 2017, arXiv:1707.06347, equation 7; Ye et al. 2020, arXiv:1912.09729, for dual_clip.
    """
    problems = []
    if not 0 <= clip_low <= 1:
        problems.append(f"clip_low must be in [0, 1], got {clip_low}: the ratio cannot fall below 0")
    if not clip_high >= 0:
        problems.append(f"clip_high must be 0 or positive, got {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        problems.append(f"dual_clip must be above 1, got {dual_clip}: it bounds the ratio of bad tokens from above")
    if problems:
        raise ConfigError(problems)
    _check_shapes("clipped_ratio_loss", student_logprobs_N, old_logprobs_N, advantages_N)
    dtype = at_least_float32(student_logprobs_N, old_logprobs_N)
    advantages_N = advantages_N.detach().to(dtype)
    log_ratio_N = student_logprobs_N.to(dtype) - old_logprobs_N.detach().to(dtype)
    # Where the advantage is 0 an overflowing ratio must not become nan: replaced before exp, or its gradient would.
    ratio_N = torch.where(advantages_N != 0, log_ratio_N, 0.0).exp()
    loss_N = -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N)
    if dual_clip is not None:
        loss_N = torch.where(advantages_N < 0, torch.minimum(loss_N, -dual_clip * advantages_N), loss_N)
    return loss_N


def clipped_likelihood_loss(
    student_logprobs_N: Tensor, old_logprobs_N: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """-min(s, clip(s, 1 - clip_low, 1 + clip_high)) on accepted tokens: RAFT++.

    `clipped_ratio_loss` with advantage 1: only the upper clip ever acts, as the minimum keeps a falling ratio.

    Shapes, Gradient, Raises: as `clipped_ratio_loss`.

    Source:
        Xiong et al. 2025, arXiv:2504.11343, RAFT++.
    """
    ones_N = torch.ones_like(student_logprobs_N, requires_grad=False)
    return clipped_ratio_loss(student_logprobs_N, old_logprobs_N, ones_N, clip_low=clip_low, clip_high=clip_high)


def sampler_weight(old_logprobs_N: Tensor, behaviour_logprobs_N: Tensor, *, cap: float = 2.0) -> Tensor:
    """min(p_old / p_behaviour, cap): the constant weight that corrects the sampler's distribution to the trainer's.

    Truncated from above only: a token the sampler over-weights is discounted in full, one it under-weights is
    raised to at most `cap`.

    Shapes:
        both (N,). returns (N,), float32 or float64, without a gradient.

    Raises:
        ConfigError: cap below 1. DataError: shapes differ.

    Source:
        Ionides 2008, truncated importance sampling; Yao et al. 2025 for the use between sampler and trainer.
    """
    if not cap >= 1:
        raise ConfigError(f"cap must be at least 1, got {cap}: below it even agreeing log-probabilities are cut")
    _check_shapes("sampler_weight", old_logprobs_N, behaviour_logprobs_N)
    dtype = at_least_float32(old_logprobs_N, behaviour_logprobs_N)
    gap_N = old_logprobs_N.detach().to(dtype) - behaviour_logprobs_N.detach().to(dtype)
    return gap_N.clamp_max(math.log(cap)).exp()


def sampled_reverse_kl(
    student_logprobs_N: Tensor,
    teacher_logprobs_N: Tensor,
    *,
    behaviour_logprobs_N: Tensor | None = None,
    max_ratio: float | None = None,
    future_N: Tensor | None = None,
) -> Tensor:
    """Reverse KL from sampled tokens, as a policy gradient: the log ratio is a constant that weighs log p_student.

    loss = w * sg(log p_student - log p_teacher + future),  w = p_student / p_behaviour

    Backpropagating the log ratio itself (k1) has expectation 0, and k3's gradient is the forward KL's; neither
    is offered.

    Args:
        teacher_logprobs_N: the teacher's, of the same sampled tokens.
        behaviour_logprobs_N: of the distribution that sampled them; None says it is the student itself, exactly.
        max_ratio: the ratio's factor is cut here (and its gradient stops above it); None leaves it.
        future_N: constant added to each token's log ratio: the discounted sum of those after it in its own
            trajectory (`future_sums`). None is discount 0: each position's own divergence given its prefix.

    Shapes:
        all (N,). returns (N,), float32 or float64.

    Units:
        Nats. On-policy and without `future_N`, the mean of the values estimates the reverse KL.

    Gradient:
        Its expectation over tokens of the behaviour equals `reverse_kl`'s (without `max_ratio`).
        Student's log-probabilities only.

    Raises:
        ConfigError: max_ratio below 1. DataError: shapes differ.

    Source:
        Gu et al. 2023 (MiniLLM), arXiv:2306.08543, equation 2; Thinking Machines 2025, "On-policy distillation".
    """
    if max_ratio is not None and not max_ratio >= 1:
        raise ConfigError(f"max_ratio must be at least 1, got {max_ratio}; None leaves the ratio uncut")
    extra = [x for x in (behaviour_logprobs_N, future_N) if x is not None]
    _check_shapes("sampled_reverse_kl", student_logprobs_N, teacher_logprobs_N, *extra)
    dtype = at_least_float32(student_logprobs_N, teacher_logprobs_N)
    student_logprobs_N = student_logprobs_N.to(dtype)
    cost_N = student_logprobs_N.detach() - teacher_logprobs_N.detach().to(dtype)
    if future_N is not None:
        cost_N = cost_N + future_N.detach().to(dtype)
    reference_N = student_logprobs_N if behaviour_logprobs_N is None else behaviour_logprobs_N
    ratio_N = (student_logprobs_N - reference_N.detach().to(dtype)).exp()
    if max_ratio is not None:
        ratio_N = ratio_N.clamp_max(max_ratio)
    return ratio_N * cost_N


def kl_estimates(student_logprobs_N: Tensor, teacher_logprobs_N: Tensor) -> dict[str, Tensor]:
    """k1, k2 and k3 of KL(student || teacher) on tokens the student sampled: metrics, without a gradient.

    With d = log p_student - log p_teacher: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. k1 and k3 have the divergence
    as their expectation; k3 is never negative and varies less near 0; k2 is biased.

    Shapes:
        both (N,). each value (N,), float32 or float64.

    Source:
        Schulman 2020, "Approximating KL divergence". As training losses k1 and k3 have the wrong gradients.
    """
    _check_shapes("kl_estimates", student_logprobs_N, teacher_logprobs_N)
    dtype = at_least_float32(student_logprobs_N, teacher_logprobs_N)
    d_N = student_logprobs_N.detach().to(dtype) - teacher_logprobs_N.detach().to(dtype)
    return {"k1": d_N, "k2": d_N.square() / 2, "k3": torch.expm1(-d_N) + d_N}


def _check_shapes(name: str, *tensors: Tensor) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) > 1:
        raise DataError(f"{name} needs one value per target in every argument, got shapes {shapes}")
