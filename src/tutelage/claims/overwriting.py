"""Claim 3: SFT overwrites, on-policy RL less, at matched new-task score."""

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.razor import ARMS, RazorSize, World, fine_tune, pretrain, r_squared

WIDTH = 64
FULL = RazorSize()


def measure(seed: int, size: RazorSize = FULL) -> Numbers:
    """Task B and drift of every arm at the same score on the new task."""
    world = World(seed)
    base = pretrain(world, WIDTH, size)
    out: dict[str, float] = {}
    runs = {(arm, lr): fine_tune(arm, base, world, lr=lr, size=size) for arm in ARMS for lr in size.rates}
    start = next(iter(runs.values()))[0]
    out["base_new"], out["base_old"] = start["new"], start["old"]
    for arm in ARMS:
        ends = [runs[arm, lr][-1] for lr in size.rates]
        out[f"old_{arm}"] = sum(e["old"] for e in ends) / len(ends)
        out[f"forward_kl_{arm}"] = sum(e["forward_kl"] for e in ends) / len(ends)
        out[f"reverse_kl_{arm}"] = sum(e["reverse_kl"] for e in ends) / len(ends)
        out[f"reached_{arm}"] = sum(e["new"] >= size.target - 1e-9 for e in ends) / len(ends)
    out["least_reached"] = min(out[f"reached_{arm}"] for arm in ARMS)
    out["two_over_fixed"] = out["old_sft_two"] - out["old_sft_fixed"]
    out["rl_over_two"] = out["old_reinforce"] - out["old_sft_two"]
    out["rl_over_fixed"] = out["old_reinforce"] - out["old_sft_fixed"]
    out["oracle_over_rl"] = out["old_oracle"] - out["old_reinforce"]
    states = [s for run in runs.values() for s in run]
    forgetting = [start["old"] - s["old"] for s in states]
    for name in ("forward_kl", "reverse_kl", "weights_l2", "new"):
        out[f"r2_{name}"] = r_squared([s[name] for s in states], forgetting)
    out["r2_kl_over_weights"] = max(out["r2_forward_kl"], out["r2_reverse_kl"]) - out["r2_weights_l2"]
    return out


CLAIM = Claim(
    name="overwriting",
    number=3,
    line="SFT, being off-policy, overwrites what the model could do; on-policy RL less, at the same new-task score",
    source="Chapter, after arXiv:2507.10616; mechanism and design: RL's Razor, arXiv:2509.04259",
    design=(
        "A classifier (2 hidden layers of 64) learns tasks A and B, ten clusters each, with shared labels. A is then "
        "re-labelled: any label of the right parity counts. Arms at Adam's 1e-3 and 3e-4, batches of 256 fresh points: "
        "SFT on one fixed label a class, SFT on one of two, REINFORCE with reward in {0, 1}, the same with a mean "
        "baseline, and SFT on the base's own distribution cut to the right labels (of all solutions the nearest to the "
        "base). Each stops at probability 0.93 of a right label; there, accuracy on B is compared, interpolated and "
        "averaged over both rates. Predicted: fixed < two < REINFORCE < nearest, and forgetting over all states is "
        "explained (quadratic fit) by KL(model || base) on A's points at least to 0.8, and by the better of both KLs "
        "better than by the distance of the weights. Eight seeds: how much of the new task the base solves "
        "already differs from seed to seed, and a first run of four gave intervals too wide to decide."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="two_over_fixed", what="task B, SFT on two labels minus on a fixed one", above=0.0),
        Prediction(name="rl_over_two", what="task B, REINFORCE minus SFT on two labels", above=0.0),
        Prediction(name="rl_over_fixed", what="task B, REINFORCE minus SFT on a fixed label", above=0.0),
        Prediction(name="oracle_over_rl", what="task B, the nearest solution minus REINFORCE", above=0.0),
        Prediction(name="least_reached", what="share of runs that reached the score compared at", above=0.99),
        Prediction(name="r2_reverse_kl", what="R2 of forgetting on KL(model || base)", above=0.8),
        Prediction(name="r2_kl_over_weights", what="R2 on the better KL minus R2 on the weights' distance", above=0.0),
    ),
    seeds=tuple(range(8)),
    minutes=1.5,
)
