"""Claim 12: RL, then rejection sampling of its checkpoint, SFT from the base, RL again; against RL alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.walks import Learner, grown, grpo, own_walks, split_tasks, straying
from tutelage.signals import HardTargets
from tutelage.sources import Accepted, Keep, Recorded
from tutelage.types import Task


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is."""

    tasks: int = 400
    held_out: int = 150
    pretraining: int = 220
    base: float = 0.4
    walks: int = 128
    group: int = 8
    steps: int = 120
    """Of RL alone: what it spends is the budget of both arms."""
    first_share: float = 0.5
    """Of the budget, for the plan's first RL."""
    samples: int = 8
    """Of the RL checkpoint, for each task."""
    epochs: int = 2
    rl_lr: float = 1e-3
    sft_lr: float = 2e-3


def reinforce(learner: Learner, tasks: Sequence[Task], size: Size, *, budget: float) -> None:
    """RL until the ledger has reached the budget."""
    source, signal = own_walks(tasks, n=size.group, per_round=size.walks // size.group), grpo()
    while learner.ledger.ledger.total < budget:
        learner.round(source, signal, lr=size.rl_lr)


def spend(learner: Learner, cost: float) -> None:
    """What earlier stages of the same arm have cost."""
    learner.ledger.ledger.flops["training"] += cost


def alone(base: Learner, tasks: Sequence[Task], size: Size) -> Learner:
    """RL from the base for a number of steps."""
    learner = base.copy()
    source, signal = own_walks(tasks, n=size.group, per_round=size.walks // size.group), grpo()
    for _ in range(size.steps):
        learner.round(source, signal, lr=size.rl_lr)
    return learner


def plan(base: Learner, tasks: Sequence[Task], size: Size, *, budget: float) -> dict[str, Learner]:
    """The four stages; the last one's ledger ends at the budget."""
    first = base.copy()
    reinforce(first, tasks, size, budget=size.first_share * budget)
    source = own_walks(tasks, n=size.samples, per_round=len(tasks))
    draw = first.draw(Accepted(source, Keep(order="sampled")))
    tuned = base.copy()
    spend(tuned, first.ledger.ledger.total)
    tuned.round(Recorded(draw.groups), HardTargets(), lr=size.sft_lr, batch_size=64, epochs=size.epochs)
    second = tuned.copy()
    spend(second, tuned.ledger.ledger.total)
    reinforce(second, tasks, size, budget=budget)
    return {"first_rl": first, "sft_from_base": tuned, "plan": second}


def measure(seed: int, size: Size = Size()) -> Numbers:
    """pass@1, pass@8 and entropy after every stage and after RL alone, for one budget."""
    train, held = split_tasks(seed, train=size.tasks)
    held = held[: size.held_out]
    base = grown(seed, "base", train, straying(0.4), width=48, layers=2, until=size.base, most=size.pretraining)
    rl = alone(base, train, size)
    budget = rl.ledger.ledger.total
    stages = {"base": base, "rl_alone": rl, **plan(base, train, size, budget=budget)}
    out: dict[str, float] = {"budget_flops": budget}
    for name, learner in stages.items():
        found = learner.evaluate(held, n=16, ks=(1, 8))
        for k in (1, 8):
            out[f"{name}_pass@{k}"] = float(np.mean(list(found.by_task(f"pass@{k}").values())))
        assert found.entropy.token_mean is not None
        out[f"{name}_entropy_nats"] = found.entropy.token_mean
    for k in (1, 8):
        out[f"plan_over_rl_pass@{k}"] = out[f"plan_pass@{k}"] - out[f"rl_alone_pass@{k}"]
    out["plan_over_rl_compute"] = stages["plan"].ledger.ledger.total / budget
    return out


CLAIM = Claim(
    name="r1_plan",
    number=12,
    line="the R1 plan: RL, rejection-sample its checkpoint, SFT from the base, RL again; against RL alone",
    source="DeepSeek-R1, arXiv:2501.12948 (about 800K rejection-sampled examples between its two RL stages)",
    design=(
        "Grid walks: a base of 48 x 2 stopped at pass@1 about 0.4 on 128 of its tasks. RL alone: 120 steps of GRPO "
        "(16 tasks, 8 walks each). The plan has the same budget of operations by the library's ledger: RL for half of "
        "it, 8 walks of that checkpoint for each of 400 tasks, those that arrive (distinct ones) as SFT data for 2 "
        "epochs from the base, RL for the rest. Held-out tasks, 16 samples. Predicted: the plan's pass@1 is above "
        "RL's alone. pass@8 and entropy are reported."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="plan_over_rl_pass@1", what="pass@1, the plan minus RL alone", above=0.0),
        Prediction(name="plan_over_rl_compute", what="compute of the plan over the budget", above=0.98, below=1.02),
    ),
    seeds=tuple(range(12)),
    minutes=6.0,
)
