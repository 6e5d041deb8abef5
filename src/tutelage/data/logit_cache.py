from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class TopK(NamedTuple):
    ids: Any
    logprobs: Any
    tail: Any

    @classmethod
    def empty(cls) -> "TopK":
        return cls(np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1)), np.zeros(0))


def spread_tail(ids_CK: Tensor, logprobs_CK: Tensor, tail_C: Tensor, vocab_size: int) -> Tensor:
    """(C, V) log-probabilities: the top-k as given, the tail's mass spread evenly over the rest."""
    is_present_CK = logprobs_CK > -torch.inf
    num_rest_C = (vocab_size - is_present_CK.sum(-1)).clamp_min(1)
    each_C = tail_C - num_rest_C.to(tail_C.dtype).log()
    full_CV = each_C.unsqueeze(-1).expand(-1, vocab_size + 1).clone()
    # Absent entries go to one column past the end: their ids may repeat a real one.
    places_CK = torch.where(is_present_CK, ids_CK, vocab_size)
    return full_CV.scatter_(-1, places_CK, logprobs_CK)[:, :vocab_size]
