"""The distribution each target was sampled from: temperature and top-p of the student's own tokens.

Dimension letters:  C  targets   V  vocabulary
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import DataError
from tutelage.numerics.logprobs import shape_logits
from tutelage.types import Draw, TargetRow, Trajectory

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


def fresh_samples(draw: Draw, rows: Sequence[TargetRow]) -> list[Trajectory]:
    """What the student sampled for this draw, among whatever else it holds: what is said of on-policy tokens holds for
    these.

    Raises:
        DataError: tokens were decoded greedily: they are a sample of no distribution that a loss could be taken under.
    """
    if not draw.is_on_policy and draw.author != "mixed":
        return []
    own = [r.trajectory for r in rows if draw.is_fresh(r.trajectory)]
    if not draw.is_on_policy:
        own = [t for t in own if any(s.is_trainable and s.author == STUDENT for s in t.spans)]
    for t in own:
        if any(s.is_trainable and s.sampling is not None and s.sampling.is_greedy for s in t.spans):
            raise DataError(
                f"the student decoded trajectory {t.id!r} greedily, which is no sample of the distribution that is "
                "graded: set rollout.temperature above 0 (1 is its own distribution)"
            )
    return own


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
