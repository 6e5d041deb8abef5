"""What a clipped objective did: how far ratios went, how many were cut, how far the policy moved from the draw's.

Dimension letter:  C  targets of a chunk
"""

from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = ("targets", "ratio", "log_ratio", "k3", "high", "low", "weight", "capped", "corrected")


class RatioStats:
    """Sums over the trained targets of the losses that ran; they add up over microbatches and processes."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(
        self,
        student_C: Tensor,
        old_C: Tensor,
        advantage_C: Tensor,
        used_C: Tensor,
        *,
        clip: tuple[float, float] | None,
        sampler_weight_C: Tensor | None,
        cap: float | None,
    ) -> None:
        """Count a chunk. `used_C` is True where the loss falls; a token is cut where its gradient is stopped."""
        log_ratio_C = torch.where(used_C, student_C.detach().double() - old_C.detach().double(), 0.0)
        ratio_C = log_ratio_C.exp()
        low, high = clip if clip is not None else (float("inf"), float("inf"))
        n = used_C.sum()
        nothing = torch.zeros((), dtype=torch.float64, device=student_C.device)
        weight_C = sampler_weight_C
        sums = [
            n,
            ratio_C.sum() - (~used_C).sum(),
            log_ratio_C.abs().sum(),
            (ratio_C - 1 - log_ratio_C).sum(),
            (used_C & (advantage_C > 0) & (ratio_C > 1 + high)).sum(),
            (used_C & (advantage_C < 0) & (ratio_C < 1 - low)).sum(),
            nothing if weight_C is None else torch.where(used_C, weight_C, 0.0).sum(),
            nothing if weight_C is None or cap is None else (used_C & (weight_C >= cap * (1 - 1e-9))).sum(),
            nothing if weight_C is None else n,
        ]
        new = torch.stack([s.double() for s in sums])
        self._sums = new if self._sums is None else self._sums + new

    def take_sums(self) -> dict[str, float]:
        """Everything since the last call, the same names every time."""
        values = [0.0] * len(NAMES) if self._sums is None else self._sums.tolist()
        self._sums = None
        return dict(zip(NAMES, values, strict=True))


def ratio_metrics(sums: Mapping[str, float], *, is_clipped: bool) -> dict[str, float]:
    """Means over the trained targets of a step; empty where nothing was trained.

    policy/ratio_mean                  p_student / p_old
    policy/mean_abs_log_ratio_nats     |log p_student - log p_old|
    policy/kl_from_draw_nats           k3 estimate of KL(old || student) a token
    policy/frac_clipped                ratios whose gradient the clip stopped; _high and _low tell which end
    policy/sampler_weight_mean         the sampler's correction; policy/frac_sampler_weight_capped at its cap
    """
    n = sums.get("targets", 0.0)
    if n <= 0:
        return {}
    out = {
        "policy/ratio_mean": sums["ratio"] / n,
        "policy/mean_abs_log_ratio_nats": sums["log_ratio"] / n,
        "policy/kl_from_draw_nats": sums["k3"] / n,
    }
    if is_clipped:
        out["policy/frac_clipped"] = (sums["high"] + sums["low"]) / n
        out |= {f"policy/frac_clipped_{end}": sums[end] / n for end in ("high", "low")}
    if sums["corrected"] > 0:
        out["policy/sampler_weight_mean"] = sums["weight"] / sums["corrected"]
        out["policy/frac_sampler_weight_capped"] = sums["capped"] / sums["corrected"]
    return out
