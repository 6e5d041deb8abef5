"""The only place a per-token loss becomes one number.

Dimension letters:  B sequences   T positions   C targets of one chunk
"""

import torch
from torch import Tensor

from tutelage.errors import NumericsError


def mean_over_tokens(loss_BT: Tensor, is_target_BT: Tensor, *, num_targets: int) -> Tensor:
    """Sum the loss over target positions and divide by a count the caller fixed beforehand.

    Args:
        loss_BT: one loss per position. Values off-target are ignored, even inf or nan.
        is_target_BT: True where the position is trained on.
        num_targets: targets in the WHOLE optimiser step, that is, over every microbatch and every process,
            counted before the first backward pass. Not `is_target_BT.sum()`: averaging microbatch averages
            weights tokens by the company they keep.

    Shapes:
        loss_BT: (B, T), float. is_target_BT: (B, T), bool. returns: (), same dtype as loss_BT.

    Units:
        Those of `loss_BT`, per target token.

    Raises:
        NumericsError: num_targets is not positive. (A microbatch without targets is fine: it returns 0 with a
            graph attached, so that every process still runs backward.)

    >>> mean_over_tokens(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]), num_targets=2).item()
    2.0
    """
    check_divisor(num_targets, "num_targets")
    return torch.where(is_target_BT, loss_BT, 0.0).sum() / num_targets


def weighted_sum(loss_BT: Tensor, weight_BT: Tensor, *, divisor: float) -> Tensor:
    """Sum of weight * loss over the positions whose weight is not 0, divided by the step's divisor.

    Args:
        loss_BT: one loss per position. Ignored where the weight is 0, even inf or nan.
        weight_BT: weight of each position; 0 takes it out, negative values are allowed.
        divisor: what the signal counts in the whole optimiser step, over every microbatch and process.

    Shapes:
        loss_BT, weight_BT: (B, T), float. returns: (), the wider of the two dtypes.

    Raises:
        NumericsError: divisor is not positive.
    """
    check_divisor(divisor, "divisor")
    is_used_BT = weight_BT != 0
    return (torch.where(is_used_BT, loss_BT, 0.0) * weight_BT).sum() / divisor


def check_divisor(divisor: float, name: str) -> None:
    """Raises NumericsError unless positive (nan is not positive)."""
    if not divisor > 0:
        raise NumericsError(
            f"{name} must be positive, got {divisor}: the whole optimiser step has nothing to train on. "
            "Check the loss mask, the acceptance rate, and max_length truncation."
        )
