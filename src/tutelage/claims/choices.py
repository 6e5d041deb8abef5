"""A world scored exactly: a prompt asks for S choices among V tokens, and two tokens are right at each.

A prompt is a vector; which pair of tokens is right at a step is a fixed function of it, to be learned by a small
network that gives all steps' logits at once. An answer is accepted where every step is right, so a prompt has 2^S right
answers and pass@k, entropy and greedy accuracy follow from the logits without sampling.

Dimension letters:  P prompts   G samples of a prompt   S steps of an answer   V tokens   D width of a prompt
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.errors import NumericsError
from tutelage.numerics import (
    clipped_ratio_loss,
    cross_entropy,
    entropy,
    group_advantages,
    reinforce_loss,
    target_logprobs,
)
from tutelage.types import seed_for

STEPS, TOKENS, WIDTH = 4, 8, 16
Arm = Literal[
    "reinforce", "drop_all_right", "drop_all_wrong", "drop_same", "drop_same_std", "mean_zero", "grpo", "raft",
    "raft_drop_all_right",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class World:
    """What is right for each prompt."""

    key_SCD: Tensor
    """The pair c with the largest key_SCD[s, c] @ prompt is right at step s: tokens 2c and 2c + 1."""

    @classmethod
    def of(cls, seed: int) -> "World":
        generator = torch.Generator().manual_seed(seed_for(seed, "world") % 2**31)
        return cls(key_SCD=torch.randn(STEPS, TOKENS // 2, WIDTH, generator=generator))

    def pairs(self, prompts_PD: Tensor) -> Tensor:
        """(P, S) index of the right pair."""
        return torch.einsum("scd,pd->psc", self.key_SCD, prompts_PD).argmax(-1)

    def is_right(self, prompts_PD: Tensor, answers_PGS: Tensor) -> Tensor:
        """(P, G) whether every token of the answer is right."""
        return (answers_PGS // 2 == self.pairs(prompts_PD)[:, None]).all(-1)


def prompts(num: int, generator: torch.Generator) -> Tensor:
    """(P, D) new prompts."""
    return torch.randn(num, WIDTH, generator=generator)


def network(seed: int, hidden: int = 64) -> nn.Sequential:
    """One hidden layer, shared by all prompts and steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "network") % 2**31)
        return nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, STEPS * TOKENS))


def logits(policy: nn.Module, prompts_PD: Tensor) -> Tensor:
    """(P, S, V) scores."""
    out: Tensor = policy(prompts_PD)
    return out.view(-1, STEPS, TOKENS)


def sample(logits_PSV: Tensor, num: int, generator: torch.Generator, *, temperature: float = 1.0) -> Tensor:
    """(P, G, S) answers."""
    probs = (logits_PSV.detach() / temperature).softmax(-1)
    flat = torch.multinomial(probs.flatten(0, 1), num, replacement=True, generator=generator)
    return flat.view(*probs.shape[:2], num).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A policy on prompts, exactly."""

    right_P: Tensor
    """Chance that a sample is accepted."""
    greedy: float
    """Share of prompts whose most likely answer is accepted."""
    entropy: float
    """Nats per token."""

    def pass_at(self, k: int) -> float:
        """Mean over prompts of 1 - (1 - p)^k."""
        return float((1 - (1 - self.right_P.double()) ** k).mean())


@torch.no_grad()
def score(policy: nn.Module, world: World, prompts_PD: Tensor) -> Score:
    """What is to know of the policy on these prompts."""
    logits_PSV = logits(policy, prompts_PD)
    pairs_PS = world.pairs(prompts_PD)
    probs_PSC = logits_PSV.softmax(-1).unflatten(-1, (TOKENS // 2, 2)).sum(-1)
    right_P = probs_PSC.gather(-1, pairs_PS.unsqueeze(-1)).squeeze(-1).prod(-1)
    greedy_PS = logits_PSV.argmax(-1)
    return Score(
        right_P=right_P,
        greedy=float((greedy_PS // 2 == pairs_PS).all(-1).float().mean()),
        entropy=float(entropy(logits_PSV).mean()),
    )


def learn(policy: nn.Module, optimizer: torch.optim.Optimizer, prompts_PD: Tensor, answers_PS: Tensor) -> None:
    """One step of cross-entropy on given answers."""
    logits_NV = logits(policy, prompts_PD).flatten(0, 1)
    loss_N = cross_entropy(logits_NV, {"target_ids_C": answers_PS.flatten()})
    optimizer.zero_grad()
    loss_N.mean().backward()
    optimizer.step()


def weak_base(
    seed: int, world: World, *, until: float, lr: float = 1e-3, batch: int = 64, most: int = 2000, check_every: int = 1
) -> nn.Sequential:
    """A network shown right answers to new prompts until it solves a share `until` of other ones."""
    policy = network(seed)
    generator = torch.Generator().manual_seed(seed_for(seed, "base") % 2**31)
    held_PD = prompts(512, generator)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for step in range(most):
        if step % check_every == 0 and score(policy, world, held_PD).pass_at(1) >= until:
            return policy
        x_PD = prompts(batch, generator)
        answers_PS = 2 * world.pairs(x_PD) + torch.randint(0, 2, (batch, STEPS), generator=generator)
        learn(policy, optimizer, x_PD, answers_PS)
    raise NumericsError(
        f"a network should reach pass@1 {until:g} in {most} steps of supervision, and did not: ask for less"
    )


def advantages(arm: Arm, is_right_PG: Tensor) -> Tensor:
    """(P, G) advantages by the library's definitions; rewards are 1 and -1, and 1 and 0 for the RAFT arms.

    A group that an arm drops has no valid sample: it trains nothing and is in no statistic.
    """
    lowest = 0.0 if arm.startswith("raft") else -1.0
    rewards = [[1.0 if r else lowest for r in group] for group in is_right_PG.tolist()]
    kind = {
        "reinforce": "reinforce",
        "drop_all_right": "reinforce",
        "drop_all_wrong": "reinforce",
        "drop_same": "reinforce_rej",
        "drop_same_std": "reinforce_rej",
        "mean_zero": "grpo_no_std",
        "grpo": "grpo",
        "raft": "raft",
        "raft_drop_all_right": "raft",
    }[arm]
    drop = {"drop_all_right": 1.0, "raft_drop_all_right": 1.0, "drop_all_wrong": lowest}.get(arm)
    valid = [[drop is None or min(g) != drop or max(g) != drop] * len(g) for g in rewards]
    out = np.array(group_advantages(rewards, kind, is_valid_P_G=valid))
    if arm == "drop_same_std":
        std_P1 = np.array(rewards).std(axis=1, keepdims=True)
        out = out / np.where(std_P1 > 0, std_P1, 1.0)
    return torch.from_numpy(out).float()


def reinforce(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    prompts_PD: Tensor,
    generator: torch.Generator,
    *,
    arm: Arm,
    n: int = 4,
    solvable_P: Tensor | None = None,
    updates: int = 1,
) -> Tensor:
    """Sample n answers to each prompt, judge, update; the mean is over all sampled tokens whatever the arm drops.

    Args:
        solvable_P: prompts at which nothing is accepted are False.
        updates: steps on the same samples. More than one uses the clipped ratio (0.2).

    Returns:
        (P, G) what was accepted.
    """
    logits_PSV = logits(policy, prompts_PD)
    answers_PGS = sample(logits_PSV, n, generator)
    is_right_PG = world.is_right(prompts_PD, answers_PGS)
    if solvable_P is not None:
        is_right_PG = is_right_PG & solvable_P[:, None]
    advantage_N = advantages(arm, is_right_PG)[:, :, None].expand_as(answers_PGS).flatten()
    if not advantage_N.any():
        return is_right_PG
    old_N: Tensor | None = None
    for update in range(updates):
        logits_PSV = logits_PSV if update == 0 else logits(policy, prompts_PD)
        logits_NV = logits_PSV[:, None].expand(-1, n, -1, -1).flatten(0, 2)
        student_N = target_logprobs(logits_NV, answers_PGS.flatten())
        old_N = student_N.detach() if old_N is None else old_N
        loss_N = (
            reinforce_loss(student_N, advantage_N)
            if updates == 1
            else clipped_ratio_loss(student_N, old_N, advantage_N)
        )
        optimizer.zero_grad()
        loss_N.mean().backward()
        optimizer.step()
    return is_right_PG


def copy_of(policy: nn.Module, make: Callable[[], nn.Sequential]) -> nn.Sequential:
    """A network with the same weights."""
    other = make()
    other.load_state_dict(policy.state_dict())
    return other
