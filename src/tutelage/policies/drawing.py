"""Drawing tokens: repeatable uniforms without state, and exact sampling by inverting the cumulative distribution.

Dimension letters in this file:
  A  rows now in the batch    V  vocabulary entries    B  blocks of the vocabulary    K  entries of a block
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutelage.errors import NumericsError
from tutelage.numerics.logprobs import shape_logits


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)


def uniform(seeds_A: NDArray[Any], steps_A: NDArray[Any]) -> NDArray[np.float64]:
    """Number `steps_A[a]` of the stream `seeds_A[a]`, uniform on [0, 1) with 53 bits. No state: a function of both.

    u = (mix(mix(seed ^ mix((step + 1) * 0x9E3779B97F4A7C15))) >> 11) * 2^-53

    Source:
        Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators": the finaliser. The seed is
        combined with a scrambled counter, so streams of different seeds never run along each other shifted.

    >>> bool(uniform(np.array([7]), np.array([0])) == uniform(np.array([7, 8]), np.array([0, 0]))[0])
    True
    """
    with np.errstate(over="ignore"):
        counter = _mix((steps_A.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
        bits = _mix(_mix(seeds_A.astype(np.uint64) ^ counter))
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


class Drawn(NamedTuple):
    """One token for every row."""

    tokens: list[int]
    logprobs: list[float]
    entropies: list[float]


_BLOCK = 128
_CHUNK_ELEMENTS = 1 << 18
"""Rows are handled in chunks of about this many logits (1 MiB in fp32), so that the passes over them stay in cache."""


def draw_tokens(logits_AV: Tensor, uniforms_A: Sequence[float], *, temperature: float, top_p: float) -> Drawn:
    """Draw one token per row by inverting the cumulative distribution at `uniforms_A`, in float32 with float64 sums.

    q = softmax(logits / temperature), cut to its nucleus and renormalised;   token = min {v : sum_{w <= v} q_w > u}

    The shaping is `numerics.logprobs.shape_logits`, the same that scores in training.

    Args:
        logits_AV: next-token logits, any float dtype.
        uniforms_A: one number in [0, 1) per row; ignored where greedy.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the smallest set of most likely tokens whose probability reaches this.

    Units:
        logprobs: nats under q, what was sampled from; under greedy decoding, under softmax(logits).
        entropies: nats, of softmax(logits): neither temperature nor top-p.

    Raises:
        NumericsError: a row of the logits has nan, +inf, or nothing finite.
    """
    rows = max(1, _CHUNK_ELEMENTS // logits_AV.shape[1])
    tokens: list[int] = []
    logprobs: list[float] = []
    entropies: list[float] = []
    for start in range(0, logits_AV.shape[0], rows):
        chunk = slice(start, start + rows)
        drawn = _draw_chunk(logits_AV[chunk], uniforms_A[chunk], temperature, top_p)
        tokens += drawn.tokens
        logprobs += drawn.logprobs
        entropies += drawn.entropies
    return Drawn(tokens, logprobs, entropies)


def _draw_chunk(logits_AV: Tensor, uniforms_A: Sequence[float], temperature: float, top_p: float) -> Drawn:
    scores_AV = logits_AV.float()
    shifted_AV = scores_AV - scores_AV.amax(-1, keepdim=True)
    weights_AV = shifted_AV.exp()
    blocks_ABK, ends_AB = _blocks(weights_AV)
    log_z_A = ends_AB[:, -1].log()
    entropies_A = log_z_A - torch.linalg.vecdot(weights_AV, shifted_AV).double() / ends_AB[:, -1]
    if not torch.isfinite(entropies_A).all():
        entropies_A = _entropies_with_banned_tokens(shifted_AV, weights_AV, log_z_A)
    if temperature == 0:
        tokens_A, logprobs_A = scores_AV.argmax(-1), -log_z_A
    else:
        if temperature != 1 or top_p != 1:
            shaped_AV = shape_logits(scores_AV, temperature=temperature, top_p=top_p)
            shifted_AV = shaped_AV - shaped_AV.amax(-1, keepdim=True)
            blocks_ABK, ends_AB = _blocks(shifted_AV.exp())
        u_A = torch.tensor(uniforms_A, dtype=torch.float64, device=logits_AV.device)
        tokens_A = _place(blocks_ABK, ends_AB, u_A)
        logprobs_A = shifted_AV.gather(1, tokens_A[:, None])[:, 0].double() - ends_AB[:, -1].log()
    return Drawn(tokens_A.tolist(), logprobs_A.tolist(), entropies_A.clamp_min(0).tolist())


def _entropies_with_banned_tokens(shifted_AV: Tensor, weights_AV: Tensor, log_z_A: Tensor) -> Tensor:
    """Entropies where some logits are -inf, whose term is 0 by continuity."""
    terms_AV = torch.where(weights_AV > 0, weights_AV * shifted_AV, 0.0)
    entropies_A = log_z_A - terms_AV.sum(-1, dtype=torch.float64) / log_z_A.exp()
    if not torch.isfinite(entropies_A).all():
        bad = (~torch.isfinite(entropies_A)).nonzero()[:, 0].tolist()
        raise NumericsError(
            f"sampling needs finite logits; rows {bad} of {len(entropies_A)} in the batch have nan, +inf or no finite "
            "logit. The weights are probably damaged or diverged: check the last training step's loss and gradient norm"
        )
    return entropies_A


def invert(weights_AV: Tensor, u_A: Tensor) -> tuple[Tensor, Tensor]:
    """(the first token whose cumulative weight exceeds u times the total, the total), for every row.

    Two levels: sums of blocks of 128 first, then one block, so that the vocabulary is read once. A token of weight 0
    is never chosen.

    Shapes:
        weights_AV: (A, V), float32, not negative, with a positive sum. u_A: (A,), float64, in [0, 1).
        returns tokens_A: (A,), int64; mass_A: (A,), float64.
    """
    blocks_ABK, ends_AB = _blocks(weights_AV)
    return _place(blocks_ABK, ends_AB, u_A), ends_AB[:, -1]


def _blocks(weights_AV: Tensor) -> tuple[Tensor, Tensor]:
    """The weights in blocks, and the float64 running sum at the end of each; the last one is the total."""
    num_rows, width = weights_AV.shape
    padding = -width % _BLOCK
    if padding:
        weights_AV = torch.nn.functional.pad(weights_AV, (0, padding))
    blocks_ABK = weights_AV.view(num_rows, -1, _BLOCK)
    return blocks_ABK, blocks_ABK.sum(-1).double().cumsum(-1)


def _place(blocks_ABK: Tensor, ends_AB: Tensor, u_A: Tensor) -> Tensor:
    total_A = ends_AB[:, -1]
    # The first place whose running sum exceeds the goal has weight, if the goal stays below the last sum.
    # For u up to 1 - 2^-53 the first bound only makes sure. The second is needed: a block's float32 sum may lie
    # above its float64 running sum.
    goal_A1 = _below(u_A * total_A, total_A)[:, None]
    block_A1 = torch.searchsorted(ends_AB, goal_A1, right=True)
    before_A1 = torch.where(block_A1 > 0, ends_AB.gather(1, (block_A1 - 1).clamp_min(0)), 0.0)
    rows_A = torch.arange(len(blocks_ABK), device=blocks_ABK.device)
    inside_AK = blocks_ABK[rows_A, block_A1[:, 0]].double().cumsum(-1)
    place_A1 = torch.searchsorted(inside_AK, _below(goal_A1 - before_A1, inside_AK[:, -1:]), right=True)
    return (block_A1 * _BLOCK + place_A1)[:, 0]


def _below(goal: Tensor, end: Tensor) -> Tensor:
    """The goal, or the largest number below `end`."""
    return torch.minimum(goal, torch.nextafter(end, torch.zeros_like(end)))
