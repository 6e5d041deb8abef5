"""The distribution each target was sampled from: temperature and top-p of the student's own tokens.

Dimension letters:  C  targets   V  vocabulary
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.numerics.logprobs import shape_logits
from tutelage.types import TargetRow, Trajectory

STUDENT = "student"


def sampled_shape(trajectory: Trajectory, *, authors: Sequence[str] | None = (STUDENT,)) -> tuple[Any, Any]:
    """(temperature_C, top_p_C) of each target: as its author sampled it; 1 for other authors and greedy tokens."""
    temperature: list[float] = []
    top_p: list[float] = []
    for span in trajectory.spans:
        if span.is_trainable:
            s = span.sampling
            known = s is not None and not s.is_greedy and (authors is None or span.author in authors)
            n = len(span.token_ids)
            temperature += [s.temperature if known and s is not None else 1.0] * n
            top_p += [s.top_p if known and s is not None else 1.0] * n
    skip = len(temperature) - trajectory.num_targets  # the very first token is never a target
    return np.array(temperature[skip:], dtype=np.float64), np.array(top_p[skip:], dtype=np.float64)


def shape_columns(rows: Sequence[TargetRow]) -> list[dict[str, Any]]:
    """`temperature_C` and `top_p_C` for every row, each only where some row's is not 1."""
    shapes = [sampled_shape(r.trajectory) for r in rows]
    needs = [any((s[i] != 1).any() for s in shapes) for i in range(2)]
    return [{name: s[i] for i, name in enumerate(("temperature_C", "top_p_C")) if needs[i]} for s in shapes]


def shaped(logits_CV: Tensor, columns_C: Mapping[str, Tensor], *, with_top_p: bool = True) -> Tensor:
    """Logits of the distribution that each target was sampled from. Rows without shaping are left as they are."""
    if "temperature_C" not in columns_C and "top_p_C" not in columns_C:
        return logits_CV
    ones_C = torch.ones(len(logits_CV), dtype=logits_CV.dtype, device=logits_CV.device)
    temperature_C = columns_C.get("temperature_C", ones_C).to(logits_CV.dtype)
    logits_CV = logits_CV / temperature_C.unsqueeze(-1)
    if not with_top_p or "top_p_C" not in columns_C:
        return logits_CV
    for top_p in columns_C["top_p_C"].unique().tolist():
        if top_p < 1:
            own_C = columns_C["top_p_C"] == top_p
            cut_CV = shape_logits(logits_CV, top_p=top_p)
            logits_CV = torch.where(own_C.unsqueeze(-1), cut_CV, logits_CV)
    return logits_CV
