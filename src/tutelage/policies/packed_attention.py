"""Attention over packed rows: several documents in one row, each seeing only itself.

Registered with transformers under `NAME`, so any architecture that supports its attention interface can use it.
Each document is attended to on its own, with its own causal mask: nothing of size (T, T) over the whole row exists,
no work is spent on other documents, and there is no mask to get wrong.

Dimension letters:  B row (always 1)   H query heads   J key/value heads   T positions of the row   E head width
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import DataError

NAME = "tutelage_packed"


def packed_attention(
    module: Any,
    query_BHTE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a packed row.

    Args:
        cu_seq_lens_q: (D+1,) int: document d is positions [cu[d], cu[d+1]). Passed through the model's forward.
        sliding_window: a query sees at most this many positions back, itself included.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).

    Returns:
        (B, T, H, E) as transformers expects, and no attention weights.

    Raises:
        DataError: called without document boundaries, or with more than one row.
    """
    if cu_seq_lens_q is None or query_BHTE.shape[0] != 1:
        raise DataError(
            f"{NAME} needs one packed row and its document boundaries (cu_seq_lens_q); got "
            f"{query_BHTE.shape[0]} rows and cu_seq_lens_q={cu_seq_lens_q}"
        )
    bounds = cu_seq_lens_q.tolist()
    p = dropout if module.training else 0.0
    out = []
    for start, stop in itertools.pairwise(bounds):
        q, k, v = (x[:, :, start:stop] for x in (query_BHTE, key_BJTE, value_BJTE))
        out.append(_one_document(q, k, v, scaling, p, sliding_window, softcap))
    return torch.cat(out, dim=2).transpose(1, 2), None


def _one_document(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, p: float, window: int | None, softcap: float | None
) -> Tensor:
    length = q.shape[2]
    is_windowed = window is not None and length > window
    if not softcap and not is_windowed:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=length > 1, scale=scaling, dropout_p=p, enable_gqa=q.shape[1] != k.shape[1]
        )
    position = torch.arange(length, device=q.device)
    is_visible_TT = position[:, None] >= position[None, :]
    if window is not None:
        is_visible_TT &= position[:, None] - position[None, :] < window
    if not softcap:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=is_visible_TT, scale=scaling, dropout_p=p, enable_gqa=q.shape[1] != k.shape[1]
        )
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.float().masked_fill(~is_visible_TT, float("-inf")).softmax(-1).to(q.dtype)
    return torch.nn.functional.dropout(weights, p) @ v


def register() -> None:
    """Make `NAME` known to transformers. Doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The documents' boundaries are the mask."""
    return None
