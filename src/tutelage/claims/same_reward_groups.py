"""Claim 10: GRPO's edge over plain Reinforce is discarding groups with one reward, not dividing by the std."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.choices import Arm, World, copy_of, network, prompts, reinforce, score, weak_base
from tutelage.types import seed_for

ARMS: tuple[Arm, ...] = (
    "reinforce",
    "drop_all_right",
    "drop_all_wrong",
    "drop_same",
    "drop_same_std",
    "mean_zero",
    "grpo",
    "raft",
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is."""

    iterations: int = 600
    batch: int = 64
    held_out: int = 1000
    lr: float = 3e-3
    streams: int = 1
    """Runs an arm with other samples; their mean is the seed's number."""


def accuracy(
    seed: int, size: Size, *, base_accuracy: float, unsolvable: float, arms: Sequence[Arm] = ARMS
) -> dict[str, float]:
    """pass@1 on solvable held-out prompts of every arm, from one base model and on the same prompts."""
    world = World.of(seed)
    base = weak_base(seed, world, until=base_accuracy)
    held_PD = prompts(size.held_out, torch.Generator().manual_seed(seed_for(seed, "held out") % 2**31))
    out = {"base": score(base, world, held_PD).pass_at(1)}
    for arm in arms:
        total = 0.0
        for stream in range(size.streams):
            policy = copy_of(base, lambda: network(seed))
            optimizer = torch.optim.Adam(policy.parameters(), lr=size.lr)
            generator = torch.Generator().manual_seed(seed_for(seed, stream, "samples") % 2**31)
            for _ in range(size.iterations):
                x_PD = prompts(size.batch, generator)
                solvable_P = torch.rand(size.batch, generator=generator) >= unsolvable
                reinforce(policy, optimizer, world, x_PD, generator, arm=arm, solvable_P=solvable_P)
            total += score(policy, world, held_PD).pass_at(1)
        out[arm] = total / size.streams
    return out


def measure(seed: int, size: Size = Size()) -> Numbers:
    """Accuracies, and what each change of Reinforce recovers of GRPO's edge over it."""
    hard = accuracy(seed, size, base_accuracy=0.035, unsolvable=0.7)
    mild = accuracy(seed, size, base_accuracy=0.13, unsolvable=0.5, arms=("reinforce", "drop_all_wrong", "grpo"))
    edge = hard["grpo"] - hard["reinforce"]
    return {
        **{f"accuracy_{name}": value for name, value in hard.items()},
        "edge": edge,
        "share_of_dropping_all_wrong": (hard["drop_all_wrong"] - hard["reinforce"]) / edge,
        "share_of_dropping_all_right": (hard["drop_all_right"] - hard["reinforce"]) / edge,
        "share_of_dropping_both": (hard["drop_same"] - hard["reinforce"]) / edge,
        "share_of_std_in_grpo": (hard["grpo"] - hard["mean_zero"]) / edge,
        "share_of_std_in_reinforce_rej": (hard["drop_same_std"] - hard["drop_same"]) / edge,
        "ratio_drop_all_wrong": hard["drop_all_wrong"] / hard["reinforce"],
        "ratio_drop_all_wrong_mild": mild["drop_all_wrong"] / mild["reinforce"],
        "accuracy_reinforce_mild": mild["reinforce"],
        "accuracy_grpo_mild": mild["grpo"],
    }


CLAIM = Claim(
    name="same_reward_groups",
    number=10,
    line="GRPO's edge is discarding groups whose rewards are all the same, not normalising by their spread",
    source="Xiong et al. 2025, arXiv:2504.11343, ablation on LLaMA-3.2-3B",
    design=(
        "A network of 64 units makes 4 choices among 8 tokens; two are right at each, and nothing is accepted at 70% "
        "of the prompts. From a base of pass@1 0.035, 600 steps on fresh prompts, 4 samples each, rewards of 1 and "
        "-1, the library's advantages: Reinforce; without all-right groups; without all-wrong ones; without both "
        "(Reinforce-Rej), also with division by the std; minus the mean; GRPO. The edge is GRPO's accuracy minus "
        "Reinforce's, on solvable held-out prompts. Predicted: dropping all-wrong groups recovers more than half of "
        "the edge and gives more than twice Reinforce's accuracy; dropping all-right ones recovers less than 0.1 of "
        "it; dividing by the std changes less than 0.1 of it, in GRPO and in Reinforce-Rej; and all of it matters "
        "less where it is easier (half unsolvable, base 0.13): there the ratio of dropping all-wrong is below 2."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(
            name="share_of_dropping_all_wrong", what="share of the edge from dropping all-wrong groups", above=0.5
        ),
        Prediction(name="ratio_drop_all_wrong", what="accuracy without all-wrong groups over Reinforce's", above=2.0),
        Prediction(
            name="share_of_dropping_all_right",
            what="share of the edge from dropping all-right groups",
            above=-0.1,
            below=0.1,
        ),
        Prediction(name="share_of_std_in_grpo", what="share of the edge from GRPO's std", above=-0.1, below=0.1),
        Prediction(
            name="share_of_std_in_reinforce_rej",
            what="share of the edge from a std in Reinforce-Rej",
            above=-0.1,
            below=0.1,
        ),
        Prediction(name="ratio_drop_all_wrong_mild", what="the same ratio where half is unsolvable", below=2.0),
    ),
    seeds=tuple(range(5)),
    minutes=4.0,
)
