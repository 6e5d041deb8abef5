"""A small world for forgetting: two tasks in one classifier, one of which is fine-tuned by imitation or by reward.

Both tasks have ten clusters of points and ten labels; a label is one of the same ten tokens in both. The new task gives
the clusters of task A new labels, of which every one of the right parity counts as right (so there is a choice of
solutions); task B is never trained again. The arms differ only in whose labels are learned.

Dimension letters:  B points   D features   V labels
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.numerics.divergence import forward_kl, reverse_kl
from tutelage.numerics.losses import cross_entropy
from tutelage.numerics.policy_gradient import reinforce_loss
from tutelage.types import seed_for

FEATURES, CLUSTERS, LABELS = 32, 10, 10
NOISE = 1.2
"""Standard deviation of points around their centres, which are about 8 apart."""
ARMS = ("sft_fixed", "sft_two", "reinforce", "reinforce_baseline", "oracle")


@dataclass(frozen=True, kw_only=True)
class RazorSize:
    """How large the experiment is."""

    target: float = 0.93
    """Probability of a right label on the new task at which arms are compared."""
    rates: tuple[float, ...] = (1e-3, 3e-4)
    batch: int = 256
    pretraining: int = 1500
    most_steps: int = 3000
    check_every: int = 10


@dataclass
class World:
    """The points of both tasks and what counts as right, fixed by a seed."""

    seed: int
    rng: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(seed_for(self.seed, "razor") % 2**62)
        self.centres_2KD = torch.randn(2, CLUSTERS, FEATURES, generator=self.rng)
        self.parity_K = torch.arange(CLUSTERS)[torch.randperm(CLUSTERS, generator=self.rng)] % 2
        self.test_A, self.test_B = self.points(0, 2000), self.points(1, 2000)

    def points(self, task: int, count: int) -> tuple[Tensor, Tensor]:
        """(B, D) points and (B,) clusters."""
        cluster_B = torch.randint(CLUSTERS, (count,), generator=self.rng)
        noise_BD = torch.randn(count, FEATURES, generator=self.rng)
        return self.centres_2KD[task, cluster_B] + NOISE * noise_BD, cluster_B

    def is_right(self, cluster_B: Tensor) -> Tensor:
        """(B, V) which labels the new task accepts."""
        return torch.arange(LABELS) % 2 == self.parity_K[cluster_B].unsqueeze(-1)


def network(width: int, seed: int) -> nn.Sequential:
    """Two hidden layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, LABELS)
        )


def pretrain(world: World, width: int, size: RazorSize) -> nn.Sequential:
    """Both tasks, each cluster under its own label, with a tenth of the labels drawn at random: a base with doubts."""
    model = network(width, seed_for(world.seed, width, "network") % 2**62)
    rule = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(size.pretraining):
        for group in rule.param_groups:
            group["lr"] = 3e-3 * (1 - step / size.pretraining)
        parts = [world.points(task, size.batch // 2) for task in (0, 1)]
        x_BD, label_B = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        is_random_B = torch.rand(len(label_B), generator=world.rng) < 0.1
        label_B = torch.where(is_random_B, torch.randint(LABELS, label_B.shape, generator=world.rng), label_B)
        rule.zero_grad()
        nll(model(x_BD), label_B).mean().backward()
        rule.step()
    return model


def nll(logits_BV: Tensor, label_B: Tensor) -> Tensor:
    """(B,) nats."""
    return cross_entropy(logits_BV, {"target_ids_C": label_B})


def arm_loss(arm: str, logits_BV: Tensor, base_logits_BV: Tensor, right_BV: Tensor, rng: torch.Generator) -> Tensor:
    """(B,) the loss whose labels are: one fixed label a class; one of two; the model's own, rewarded; the base's own
    distribution cut to what is right, which of all solutions is the one nearest the base."""
    parity_B = right_BV[:, 1].long()
    if arm == "sft_fixed":
        return nll(logits_BV, parity_B)
    if arm == "sft_two":
        return nll(logits_BV, parity_B + 2 * torch.randint(2, parity_B.shape, generator=rng))
    if arm == "oracle":
        target_BV = base_logits_BV.masked_fill(~right_BV, -torch.inf)
        return forward_kl(logits_BV, target_BV)
    sample_B = torch.multinomial(logits_BV.detach().softmax(-1), 1, generator=rng).squeeze(-1)
    reward_B = right_BV.gather(1, sample_B.unsqueeze(-1)).squeeze(-1).to(logits_BV.dtype)
    advantage_B = reward_B - reward_B.mean() if arm == "reinforce_baseline" else reward_B
    return reinforce_loss(-nll(logits_BV, sample_B), advantage_B)


@torch.no_grad()
def state_of(model: nn.Sequential, base: nn.Sequential, world: World) -> dict[str, float]:
    """Scores and drift on held-out points: probability of a right label on the new task, accuracy on task B, both KLs
    to the base on the new task's points (nats), and the distance of the weights."""
    x_BD, cluster_B = world.test_A
    logits_BV, base_BV = model(x_BD), base(x_BD)
    right_BV = world.is_right(cluster_B)
    moved = sum(float((p - q).square().sum()) for p, q in zip(model.parameters(), base.parameters(), strict=True))
    return {
        "new": float((logits_BV.softmax(-1) * right_BV).sum(-1).mean()),
        "old": float((model(world.test_B[0]).argmax(-1) == world.test_B[1]).float().mean()),
        "forward_kl": float(forward_kl(logits_BV, base_BV).mean()),  # KL(base || model): the base is the "teacher"
        "reverse_kl": float(reverse_kl(logits_BV, base_BV).mean()),
        "weights_l2": moved**0.5,
    }


def fine_tune(arm: str, base: nn.Sequential, world: World, *, lr: float, size: RazorSize) -> list[dict[str, float]]:
    """States every few steps until the target is passed, the last one at it by interpolation in the new-task score."""
    model = network(base[0].out_features, 0)  # type: ignore[arg-type]
    model.load_state_dict(base.state_dict())
    rule = torch.optim.Adam(model.parameters(), lr=lr)
    rng = torch.Generator().manual_seed(seed_for(world.seed, arm, repr(lr)) % 2**62)
    states = [state_of(model, base, world)]
    for step in range(size.most_steps):
        x_BD, cluster_B = world.points(0, size.batch)
        with torch.no_grad():
            base_BV = base(x_BD)
        rule.zero_grad()
        arm_loss(arm, model(x_BD), base_BV, world.is_right(cluster_B), rng).mean().backward()
        rule.step()
        if step % size.check_every == size.check_every - 1:
            states.append(state_of(model, base, world))
            if states[-1]["new"] >= size.target:
                return [*states[:-1], at_target(states[-2], states[-1], size.target)]
    return states


def at_target(before: Mapping[str, float], after: Mapping[str, float], target: float) -> dict[str, float]:
    """The state where the new-task score is exactly the target, between two states, linearly."""
    share = (target - before["new"]) / (after["new"] - before["new"])
    return {name: before[name] + share * (after[name] - before[name]) for name in before}


def r_squared(x: Sequence[float], y: Sequence[float]) -> float:
    """Share of y's variance that a quadratic in x explains."""
    fit = np.polyval(np.polyfit(x, y, 2), x)
    return float(1 - np.var(np.asarray(y) - fit) / np.var(y))
