"""Attention over packed rows: several documents in one row, each seeing only itself.

Registered with transformers under `NAME`, so any architecture that supports its attention interface can use it.
No document sees another: each is attended to on its own, or short ones side by side as rows of a batch. Nothing of size
(T, T) over the whole row exists, and no work is spent across documents. Which way is taken changes the time, and the
result by rounding.

Dimension letters:  B row (always 1)   H query heads   J key/value heads   T positions of the row   E head width
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tutelage.errors import DataError

NAME = "tutelage_packed"
TOGETHER = 256
"""On an accelerator, documents up to this many tokens are padded to one length and attended to together."""
PRODUCTS = 512
"""On a CPU in bfloat16, documents up to this many tokens are trained on through plain matrix products, which run on its
matrix units: 2 to 3 times as fast as the fused kernel, whose backward does not use them."""

_LONGEST_WINDOW = 1024
"""A sliding window up to this long is reached at the start of a run."""

Way = Literal["together", "products", "kernel"]


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
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    is_plain = p == 0 and not softcap and window_is_wide(sliding_window, max(lengths))
    way = choose_way(query_BHTE, lengths) if is_plain else "kernel"
    if way == "together":
        return _short_documents(query_BHTE, key_BJTE, value_BJTE, scaling, cu_seq_lens_q.long(), max(lengths)), None
    # Backward of one split is one concatenation; of slices, a row of zeros for each document.
    parts = zip(*(x.split(lengths, dim=2) for x in (query_BHTE, key_BJTE, value_BJTE)), strict=True)
    longest = max((n for n in lengths if n <= PRODUCTS and way == "products"), default=0)
    hidden_LL = query_BHTE.new_full((longest, longest), float("-inf")).triu_(1)
    out = [
        _by_products(q, k, v, scaling, hidden_LL)
        if q.shape[2] <= longest
        else _one_document(q, k, v, scaling, p, sliding_window, softcap)
        for q, k, v in parts
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


def choose_way(query_BHTE: Tensor, lengths: Sequence[int]) -> Way:
    """The fastest of the ways that attend plainly: causal, no dropout, no soft cap, nothing out of a window's reach."""
    if query_BHTE.device.type != "cpu":
        return "together" if len(lengths) > 1 and max(lengths) <= TOGETHER else "kernel"
    is_trained = torch.is_grad_enabled() and query_BHTE.requires_grad
    return "products" if is_trained and query_BHTE.dtype == torch.bfloat16 else "kernel"


def telling_length(config: Any) -> int | None:
    """Tokens of a document that is attended to otherwise than short ones are, for a check; None if there is none.

    It is beyond `PRODUCTS`, and beyond the model's sliding window unless that is very long.
    """
    window = getattr(config, "sliding_window", None) or 0
    length = max(PRODUCTS, window if window <= _LONGEST_WINDOW else 0) + 8
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    return length if length > PRODUCTS or 0 < window < length else None


def window_is_wide(window: int | None, longest: int) -> bool:
    """True where no query is too far from the first token of its document to see it."""
    return window is None or window >= longest


def _short_documents(
    query_BHTE: Tensor, key_BJTE: Tensor, value_BJTE: Tensor, scaling: float | None, bounds: Tensor, longest: int
) -> Tensor:
    """All documents at once, padded to the longest: for short ones one call per document costs more than its work.

    Dimension letters:  P documents   L positions of the longest   G query heads for each key head
    """
    starts_P, lengths_P = bounds[:-1], bounds.diff()
    place_L = torch.arange(longest, device=bounds.device)
    is_token_PL = place_L < lengths_P[:, None]
    # Padding reads some token of the row; what it computes is never taken out again.
    index_PL = torch.where(is_token_PL, starts_P[:, None] + place_L, starts_P[:, None])
    query_PHLE, key_PJLE, value_PJLE = (x[0][:, index_PL].transpose(0, 1) for x in (query_BHTE, key_BJTE, value_BJTE))
    num_documents, num_heads, _, width = query_PHLE.shape
    groups = num_heads // key_PJLE.shape[1]
    query = query_PHLE.unflatten(1, (-1, groups)).flatten(2, 3).flatten(0, 1)  # (P*J, G*L, E)
    key, value = (x.flatten(0, 1) for x in (key_PJLE, value_PJLE))
    scores = at_least_float32(torch.bmm(query, key.transpose(1, 2))) * (width**-0.5 if scaling is None else scaling)
    is_visible_LL = place_L[:, None] >= place_L
    hidden = torch.zeros(longest, longest, device=bounds.device).masked_fill(~is_visible_LL, float("-inf"))
    weights = (scores.unflatten(1, (groups, longest)) + hidden).softmax(-1).flatten(1, 2).to(value.dtype)
    mixed = torch.bmm(weights, value).unflatten(0, (num_documents, -1)).unflatten(2, (groups, longest))
    out_BTHE: Tensor = mixed.permute(0, 3, 1, 2, 4).flatten(2, 3)[is_token_PL][None]  # from P L J G E
    return out_BTHE


def _by_products(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, hidden_LL: Tensor) -> Tensor:
    """One document as two batched products and a softmax (which computes in float32 whatever it is given)."""
    num_heads, length, width = q.shape[1:]
    groups = num_heads // k.shape[1]
    query = q[0].reshape(-1, groups * length, width)  # (J, G*L, E): the query heads of a key head under each other
    hidden = hidden_LL[:length, :length].repeat(groups, 1)
    scores = torch.baddbmm(hidden, query, k[0].transpose(1, 2), alpha=width**-0.5 if scaling is None else scaling)
    mixed: Tensor = torch.bmm(scores.softmax(-1), v[0])
    return mixed.view(1, num_heads, length, width)


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
    weights = at_least_float32(scores).masked_fill(~is_visible_TT, float("-inf")).softmax(-1).to(q.dtype)
    return torch.nn.functional.dropout(weights, p) @ v


def at_least_float32(x: Tensor) -> Tensor:
    """A softmax in less loses the small weights."""
    return x if x.dtype == torch.float64 else x.float()


def register() -> None:
    """Make `NAME` known to transformers. Doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The documents' boundaries are the mask."""
    return None
