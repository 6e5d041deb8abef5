"""Log-probabilities, entropies, and the one function that shapes logits for sampling and for scoring.

Dimension letters:  B sequences   T positions   V vocabulary   C targets of one chunk   N rows
Every function takes any number of leading axes: `_BTV` in a name is the usual case, `_CV` works the same.
"""

import torch
from torch import Tensor

from tutelage.errors import ConfigError


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype softmax runs in: float64 if any input is, else float32 (bf16 loses the tail)."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def target_logprobs(logits_BTV: Tensor, target_ids_BT: Tensor) -> Tensor:
    """Log-probability of the given token at every position.

    out[b, t] = logits[b, t, target] - logsumexp_v logits[b, t, v]

    Shapes:
        logits_BTV: (B, T, V), any float dtype. target_ids_BT: (B, T), integer ids in [0, V).
        returns (B, T), float32, or float64 if the logits are.

    Units:
        Nats, at most 0 beyond rounding. -inf where the target's logit is.

    Gradient:
        d out / d logits[v] = 1[v = target] - p(v).

    >>> target_logprobs(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp().item()
    0.25
    """
    logits_BTV = logits_BTV.to(at_least_float32(logits_BTV))
    chosen_BT = logits_BTV.gather(-1, target_ids_BT.unsqueeze(-1)).squeeze(-1)
    return chosen_BT - logits_BTV.logsumexp(-1)


def entropy(logits_BTV: Tensor) -> Tensor:
    """Exact entropy of the next-token distribution at every position.

    H[b, t] = -sum_v p(v) log p(v),  p = softmax(logits); entries with p = 0 count as 0.

    Shapes:
        logits_BTV: (B, T, V), any float dtype; -inf entries allowed. returns (B, T), float32 or float64.

    Units:
        Nats, in [0, log V].

    Gradient:
        d H / d logits[v] = -p(v) (log p(v) + H), finite also where the logit is -inf.

    >>> round(entropy(torch.zeros(1, 1, 8)).exp().item(), 4)
    8.0
    """
    logprobs_BTV = logits_BTV.to(at_least_float32(logits_BTV)).log_softmax(-1)
    probs_BTV = logprobs_BTV.exp()
    return -(probs_BTV * torch.where(probs_BTV > 0, logprobs_BTV, 0.0)).sum(-1)


def shape_logits(logits_BTV: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Logits of the distribution that is sampled: divided by the temperature, then cut to the nucleus.

    The same function shapes what is drawn and what is scored, so that a draw's log-probabilities belong to the
    distribution it came from.

    Args:
        logits_BTV: unnormalised scores.
        temperature: divides the logits. 0 leaves only the most likely token (the lowest id among equals).
        top_p: keep the smallest set of tokens, most likely first, whose probability after temperature reaches
            this; the token that crosses it is kept. Equal tokens enter by id, so the set is always the smallest.

    Shapes:
        logits_BTV: (B, T, V), any float dtype. returns the same shape, float32 or float64; -inf outside the set.

    Gradient:
        Through the division; none where the entry was cut. The set itself is a constant.

    Raises:
        ConfigError: temperature is negative, or top_p is not in (0, 1].

    Source:
        Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    problems = []
    if not temperature >= 0:
        problems.append(f"temperature must be 0 (greedy) or positive, got {temperature}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p must be in (0, 1], got {top_p}; 1 keeps every token")
    if problems:
        raise ConfigError(problems)
    logits_BTV = logits_BTV.to(at_least_float32(logits_BTV))
    if temperature == 0:
        best = logits_BTV.argmax(-1, keepdim=True)
        return torch.full_like(logits_BTV, -torch.inf).scatter(-1, best, 0.0)
    if temperature != 1:
        logits_BTV = logits_BTV / temperature
    if top_p == 1:
        return logits_BTV
    flat_NV = logits_BTV.detach().reshape(-1, logits_BTV.shape[-1])
    is_kept_BTV = _nucleus(flat_NV, top_p).reshape(logits_BTV.shape)
    return torch.where(is_kept_BTV, logits_BTV, -torch.inf)


def _nucleus(logits_NV: Tensor, top_p: float) -> Tensor:
    """(N, V) bool: the smallest set per row reaching `top_p`.

    Sorting a whole vocabulary is the slow way: the nucleus nearly always lies within the first few hundred
    tokens, so the search widens only for the rows that need it.
    """
    size = logits_NV.shape[-1]
    log_total_N = logits_NV.logsumexp(-1)
    threshold_N = torch.empty_like(log_total_N)
    num_kept_N = torch.empty_like(log_total_N, dtype=torch.long)
    rows = torch.arange(len(logits_NV), device=logits_NV.device)
    width = min(size, 64)
    while len(rows) > 0:
        # Sums run in float64: in float32 the nucleus would depend on how many entries were looked at.
        values = logits_NV[rows].topk(width, dim=-1, sorted=True).values
        reached = (values - log_total_N[rows, None]).double().exp().cumsum(-1)
        # The number before the crossing token, plus the token itself.
        num_kept = (reached < top_p).sum(-1) + 1
        is_found = (num_kept <= width) | (width == size)
        num_kept = num_kept.clamp_max(width)
        threshold = values.gather(-1, num_kept.unsqueeze(-1) - 1).squeeze(-1)
        threshold_N[rows[is_found]] = threshold[is_found]
        num_kept_N[rows[is_found]] = num_kept[is_found]
        rows = rows[~is_found]
        width = min(size, width * 16)
    is_kept_NV = logits_NV >= threshold_N[:, None]
    excess_N = is_kept_NV.sum(-1) - num_kept_N
    for row in excess_N.nonzero().flatten().tolist():  # ties at the edge: the lowest ids stay
        tied = (logits_NV[row] == threshold_N[row]).nonzero().flatten()
        is_kept_NV[row, tied[len(tied) - int(excess_N[row]) :]] = False
    return is_kept_NV
