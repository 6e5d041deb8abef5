"""Claim 4: SFT's overwriting is worse on smaller models."""

from dataclasses import dataclass

import numpy as np

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.razor import RazorSize, World, fine_tune, pretrain

ARMS = ("sft_two", "reinforce")


@dataclass(frozen=True, kw_only=True)
class Size(RazorSize):
    """How large the experiment is."""

    widths: tuple[int, ...] = (16, 64, 256)
    rates: tuple[float, ...] = (1e-3,)


def measure(seed: int, size: Size = Size()) -> Numbers:
    """What each size of model keeps of task B at the same score on the new task."""
    out: dict[str, float] = {}
    for width in size.widths:
        world = World(seed)
        base = pretrain(world, width, size)
        for arm in ARMS:
            runs = [fine_tune(arm, base, world, lr=lr, size=size) for lr in size.rates]
            old = float(np.mean([run[-1]["old"] for run in runs]))
            base_old = runs[0][0]["old"]
            out[f"base_old_{width}"] = base_old
            out[f"lost_{arm}_{width}"] = 1 - old / base_old
            out[f"reached_{arm}_{width}"] = float(np.mean([run[-1]["new"] >= size.target - 1e-9 for run in runs]))
        out[f"lost_more_by_sft_{width}"] = out[f"lost_sft_two_{width}"] - out[f"lost_reinforce_{width}"]
    doublings = np.log2(size.widths)
    for arm in ARMS:
        lost = [out[f"lost_{arm}_{width}"] for width in size.widths]
        out[f"lost_{arm}_per_doubling"] = float(np.polyfit(doublings, lost, 1)[0])
        out[f"lost_{arm}_smallest_over_largest"] = lost[0] - lost[-1]
    out["least_reached"] = min(v for k, v in out.items() if k.startswith("reached_"))
    return out


CLAIM = Claim(
    name="small_models",
    number=4,
    line="SFT's overwriting is worse on small models (less capacity to absorb without forgetting)",
    source="The chapter's gotcha of SFT; design after RL's Razor, arXiv:2509.04259",
    design=(
        "As `overwriting`, with classifiers of 16, 64 and 256 units in both hidden layers, SFT on one of two labels "
        "and REINFORCE at 1e-3, stopped at probability 0.93 of a right label on the new task. (SFT on one fixed label "
        "leaves too little of task B at any size to tell sizes apart, as a trial with another seed showed.) Compared "
        "is the share of the base's own accuracy on task B that is lost. Predicted for SFT: the smallest model loses "
        "more than the largest, and the loss falls with every doubling of the width."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(
            name="lost_sft_two_smallest_over_largest",
            what="share of task B that SFT loses, smallest model minus largest",
            above=0.0,
        ),
        Prediction(
            name="lost_sft_two_per_doubling", what="change of the share lost by SFT per doubling of width", below=0.0
        ),
        Prediction(name="least_reached", what="share of runs that reached the score compared at", above=0.99),
    ),
    seeds=tuple(range(12)),
    minutes=2.0,
)
