"""Claim 9: trained on positives only, entropy collapses; gains come early and then stop."""

from dataclasses import dataclass

import torch

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.choices import Arm, World, advantages, copy_of, network, prompts, reinforce, score, weak_base
from tutelage.monitors.entropy import duplicate_share
from tutelage.numerics import entropy, reinforce_loss, target_logprobs
from tutelage.types import seed_for

ACTIONS, RIGHT = 8, 4


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is."""

    rows: int = 64
    table_iterations: int = 1000
    table_lr: float = 0.4
    """So large that every arm's accuracy passes 0.99 within the iterations."""
    prompts: int = 256
    batch: int = 64
    iterations: int = 2000
    early: int = 200
    lr: float = 1e-3
    held_out: int = 1000
    streams: int = 1
    """Runs an arm of the network with other samples; their mean is the seed's number."""


def table(arm: Arm, seed: int, size: Size) -> dict[str, float]:
    """A row of logits for each prompt, half of its actions right, plain gradient steps on 4 samples a prompt."""
    generator = torch.Generator().manual_seed(seed_for(seed, "table") % 2**31)
    logits_PV = torch.zeros(size.rows, ACTIONS, requires_grad=True)
    for _ in range(size.table_iterations):
        actions_PG = torch.multinomial(logits_PV.detach().softmax(-1), 4, replacement=True, generator=generator)
        advantage_N = advantages(arm, actions_PG < RIGHT).flatten()
        logits_NV = logits_PV[:, None].expand(-1, 4, -1).flatten(0, 1)
        loss_N = reinforce_loss(target_logprobs(logits_NV, actions_PG.flatten()), advantage_N)
        (gradient_PV,) = torch.autograd.grad(loss_N.sum() / 4, logits_PV)
        with torch.no_grad():
            logits_PV -= size.table_lr * gradient_PV
    probs_PV = logits_PV.detach().softmax(-1)
    samples = torch.multinomial(probs_PV, 32, replacement=True, generator=generator).tolist()
    accepted = {str(p): [a for a in row if a < RIGHT] for p, row in enumerate(samples)}
    return {
        "entropy": float(entropy(logits_PV.detach()).mean()),
        "accuracy": float(probs_PV[:, :RIGHT].sum(-1).mean()),
        "duplicates": duplicate_share(accepted) or 0.0,
    }


def curves(arm: Arm, seed: int, size: Size) -> dict[int, tuple[float, float, float]]:
    """Iteration -> (pass@1, pass@64, nats per token) on held-out prompts, trained on a fixed set of prompts."""
    world = World.of(seed)
    base = weak_base(seed, world, until=0.035)
    generator = torch.Generator().manual_seed(seed_for(seed, "prompts") % 2**31)
    held_PD, fixed_PD = prompts(size.held_out, generator), prompts(size.prompts, generator)
    third = size.iterations // 3
    looks = sorted({size.early, third, 2 * third, size.iterations})
    sums = {look: [0.0, 0.0, 0.0] for look in (0, *looks)}
    for stream in range(size.streams):
        policy = copy_of(base, lambda: network(seed))
        optimizer = torch.optim.Adam(policy.parameters(), lr=size.lr)
        generator = torch.Generator().manual_seed(seed_for(seed, stream, "samples") % 2**31)
        for iteration in range(size.iterations + 1):
            if iteration in sums:
                s = score(policy, world, held_PD)
                for i, value in enumerate((s.pass_at(1), s.pass_at(64), s.entropy)):
                    sums[iteration][i] += value / size.streams
            chosen = torch.randperm(size.prompts, generator=generator)[: size.batch]
            reinforce(policy, optimizer, world, fixed_PD[chosen], generator, arm=arm)
    return {look: (values[0], values[1], values[2]) for look, values in sums.items()}


def measure(seed: int, size: Size = Size()) -> Numbers:
    """Entropies of the table at equal accuracy; early and late accuracies of the network."""
    arms: tuple[Arm, ...] = ("raft", "drop_all_wrong", "drop_all_right", "grpo", "raft_drop_all_right")
    tables = {arm: table(arm, seed, size) for arm in arms}
    raft, grpo = curves("raft", seed, size), curves("grpo", seed, size)
    third, end = size.iterations // 3, size.iterations
    out = {f"table_{what}_{arm}": value for arm, t in tables.items() for what, value in t.items()}
    return {
        **out,
        "table_entropy_grpo_over_raft": tables["grpo"]["entropy"] / tables["raft"]["entropy"],
        "table_entropy_kept_by_dropping_all_right": tables["raft_drop_all_right"]["entropy"]
        / tables["raft"]["entropy"],
        "table_duplicates_raft_minus_grpo": tables["raft"]["duplicates"] - tables["grpo"]["duplicates"],
        "pass1_base": raft[0][0],
        "pass1_raft": raft[end][0],
        "pass1_grpo": grpo[end][0],
        "early_lead": raft[size.early][0] - grpo[size.early][0],
        "late_lead": raft[end][0] - grpo[end][0],
        "raft_last_third_over_first": (raft[end][0] - raft[2 * third][0]) / (raft[third][0] - raft[0][0]),
        "early_entropy_raft_minus_grpo": raft[size.early][2] - grpo[size.early][2],
        "pass64_raft_change": raft[end][1] - raft[size.early][1],
        "late_pass64_raft_minus_grpo": raft[end][1] - grpo[end][1],
    }


CLAIM = Claim(
    name="entropy_collapse",
    number=9,
    line="on positives only (rejection sampling) entropy collapses: fast early gains, then a plateau",
    source="Xiong et al. 2025, arXiv:2504.11343; Cui et al. 2025, arXiv:2505.22617 (entropy is spent for reward)",
    design=(
        "First a table: 64 prompts, 8 actions of which 4 are right, 1,000 plain gradient steps on 4 samples a prompt, "
        "the library's advantages. Predicted: RAFT and GRPO are right in more than 0.99, and GRPO keeps more than "
        "twice RAFT's entropy; RAFT without all-right groups keeps more than twice, too; RAFT's accepted samples "
        "repeat more. Then the network of claim 10 on 256 fixed prompts, all solvable, 2,000 steps. Predicted: RAFT "
        "is ahead of GRPO in held-out pass@1 at step 200, with lower entropy, and behind at the end; its gain in the "
        "last third of the steps is below a quarter of that in the first."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="table_accuracy_raft", what="RAFT's accuracy on the table", above=0.99),
        Prediction(name="table_accuracy_grpo", what="GRPO's accuracy on the table", above=0.99),
        Prediction(name="table_entropy_grpo_over_raft", what="GRPO's entropy over RAFT's", above=2.0),
        Prediction(
            name="table_entropy_kept_by_dropping_all_right",
            what="entropy of RAFT without all-right groups over RAFT's",
            above=2.0,
        ),
        Prediction(name="table_duplicates_raft_minus_grpo", what="repeats among accepted, RAFT minus GRPO", above=0.0),
        Prediction(name="early_lead", what="RAFT's lead over GRPO in pass@1 at step 200", above=0.0),
        Prediction(name="early_entropy_raft_minus_grpo", what="nats a token at step 200, RAFT minus GRPO", below=0.0),
        Prediction(name="late_lead", what="RAFT's lead over GRPO in pass@1 at the end", below=0.0),
        Prediction(name="raft_last_third_over_first", what="RAFT's gain, last third over first", below=0.25),
    ),
    seeds=tuple(range(12)),
    minutes=2.0,
)
