"""Claim 8: rejection sampling is the policy gradient with a reward of 1 or 0, to first order; and what it costs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.choices import (
    STEPS,
    TOKENS,
    WIDTH,
    World,
    advantages,
    copy_of,
    learn,
    logits,
    network,
    prompts,
    reinforce,
    sample,
    score,
    weak_base,
)
from tutelage.claims.tables import FirstIsEven, TableSampler, TableText, questions
from tutelage.data.collate import collate
from tutelage.numerics import reverse_kl
from tutelage.policies.table import TablePolicy
from tutelage.signals import HardTargets
from tutelage.signals.policy_gradient import PolicyGradient
from tutelage.sources import Accepted, Drawn, Judged, Keep
from tutelage.train.distributed import Processes
from tutelage.train.ledger import ModelCost
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Trainer
from tutelage.types import Draw, DrawContext, SamplingParams, Targets, seed_for

VOCAB = 9


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the second part is."""

    batch: int = 64
    n: int = 4
    """Answers a prompt in rejection sampling and GRPO; distillation and SFT need one."""
    start: float = 0.035
    target: float = 0.3
    teacher: float = 0.6
    """Twice the target."""
    rates: tuple[float, ...] = (3e-3, 1e-2)
    """An arm's compute is that of its best rate."""
    most: int = 600
    check_every: int = 5
    held_out: int = 500


# -- the identity -------------------------------------------------------------------------------


def answered(policy: TablePolicy, seed: int, *, is_kept_only: bool) -> Draw:
    """Eight judged answers to each question; the rejected ones with weight 0, or all with weight 1."""
    ctx = DrawContext(
        seed=seed,
        stage=0,
        round=0,
        sampler=lambda name: TableSampler(policy, author=name, version="start"),
        text=TableText(),
    )
    source = Judged(Drawn(questions(VOCAB), n=8, params=SamplingParams(max_new_tokens=6)), FirstIsEven())
    return Accepted(source, Keep(distinct=None)).draw(ctx) if is_kept_only else source.draw(ctx)


def gradient(policy: TablePolicy, targets: Targets, signal: HardTargets | PolicyGradient) -> Tensor:
    """Of one step on all rows, as the trainer takes it."""
    policy.zero_grad()
    rows = [row for row in targets.rows if row.is_trained]
    batch = collate(rows, dtype=torch.float64)
    loss, _ = policy(batch, signal.loss, divisor=sum(row.count for row in targets.rows))
    loss.backward()
    assert policy.table_VD.grad is not None
    return policy.table_VD.grad.clone()


def written_out(policy: TablePolicy, draw: Draw) -> Tensor:
    """-grad of (1 / sampled tokens) sum over samples of reward * log p(answer), straight from the definition."""
    policy.zero_grad()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for t in draw:
        ids = torch.tensor([t.token_ids])
        logprobs_TV = policy.logits(ids)[0, :-1].log_softmax(-1)
        reward = 1.0 if t.verdict is not None and t.verdict.is_accepted else 0.0
        total = total + reward * logprobs_TV.gather(-1, ids[0, 1:, None]).sum()
        tokens += t.num_sampled
    (-total / tokens).backward()
    assert policy.table_VD.grad is not None
    return policy.table_VD.grad.clone()


def identity(seed: int) -> dict[str, float]:
    """Relative differences of gradients, in float64."""
    policy = TablePolicy(VOCAB, seed=seed)
    kept_draw, whole_draw = answered(policy, seed, is_kept_only=True), answered(policy, seed, is_kept_only=False)
    trainer = Trainer(policy, Optimizer(policy.named_parameters(), kind="sgd"), processes=Processes())
    ratio = PolicyGradient("accepted", clip=(1.0, 1e6), truncated="keep", sampler_cap=None)
    plain = PolicyGradient("accepted", clip=None, truncated="keep", sampler_cap=None, recompute=False)
    sampled, kept = HardTargets(divisor="sampled"), HardTargets(divisor="targets")
    prepared: dict[HardTargets | PolicyGradient, Targets] = {}
    for signal in (ratio, plain, sampled, kept):
        draw = whole_draw if signal in (ratio, plain) else kept_draw
        prepared[signal] = signal.prepare(draw, score_student=trainer.score)
    reference = written_out(policy, whole_draw)
    ours = gradient(policy, prepared[sampled], sampled)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    out = {
        "hard_targets_apart": apart(ours, reference),
        "policy_gradient_apart": apart(gradient(policy, prepared[plain], plain), reference),
        "with_ratios_apart": apart(gradient(policy, prepared[ratio], ratio), reference),
        "mean_over_kept_apart": apart(gradient(policy, prepared[kept], kept), reference),
        "frac_accepted": sum(t.weight for t in kept_draw) / len(kept_draw),
    }
    moved = copy.deepcopy(policy)
    with torch.no_grad():
        moved.table_VD.sub_(2.0 * ours)
    second = gradient(moved, prepared[sampled], sampled)
    return {**out, "second_step_apart": apart(second, gradient(moved, prepared[ratio], ratio))}


# -- compute to an equal score ------------------------------------------------------------------


def cost(hidden: int = 64) -> ModelCost:
    """Of one token of the network, as the library's ledger counts: two operations a weight."""
    return ModelCost(body=2.0 * WIDTH * hidden, attention=0.0, head=2.0 * hidden * TOKENS)


def compute_to_target(
    size: Size, policy: torch.nn.Module, world: World, held_PD: Tensor, step: Callable[[], float]
) -> tuple[float, bool]:
    """Operations until held-out pass@1 is at the target, and whether it got there."""
    spent = 0.0
    for i in range(size.most):
        spent += step()
        if i % size.check_every == 0 and score(policy, world, held_PD).pass_at(1) >= size.target:
            return spent, True
    return spent, False


def ledger(seed: int, size: Size) -> dict[str, float]:
    """Operations of SFT, rejection sampling, on-policy distillation and GRPO to the same score, from one base."""
    world = World.of(seed)
    base = weak_base(seed, world, until=size.start)
    teacher = weak_base(seed, world, until=size.teacher, lr=3e-3, most=20_000, check_every=50)
    held_PD = prompts(size.held_out, torch.Generator().manual_seed(seed_for(seed, "held out") % 2**31))
    token, train = cost().forward(STEPS), cost().training(STEPS, heads=STEPS)

    def run(method: str, lr: float) -> tuple[float, bool]:
        policy = copy_of(base, lambda: network(seed))
        optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(seed_for(seed, "samples") % 2**31)

        def step() -> float:
            x_PD = prompts(size.batch, generator)
            if method == "sft":
                gold_PS = 2 * world.pairs(x_PD) + torch.randint(0, 2, (size.batch, STEPS), generator=generator)
                learn(policy, optimizer, x_PD, gold_PS)
                return size.batch * train
            if method == "distillation":
                student_PSV = logits(policy, x_PD)
                sample(student_PSV, 1, generator)  # the states of this world do not depend on it; its cost counts
                with torch.no_grad():
                    teacher_PSV = logits(teacher, x_PD)
                loss = reverse_kl(student_PSV, teacher_PSV).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                return size.batch * (2 * token + train)
            arm = "raft" if method == "rejection" else "grpo"
            is_right_PG = reinforce(policy, optimizer, world, x_PD, generator, arm=arm, n=size.n)  # type: ignore[arg-type]
            trained = int((advantages(arm, is_right_PG) != 0).sum())  # type: ignore[arg-type]
            return size.batch * size.n * token + trained * train

        return compute_to_target(size, policy, world, held_PD, step)

    out: dict[str, float] = {}
    for method in ("sft", "rejection", "distillation", "grpo"):
        runs = [run(method, lr) for lr in size.rates]
        reached = [spent for spent, ok in runs if ok]
        out[f"flops_{method}"] = min(reached) if reached else max(spent for spent, _ in runs)
        out[f"reached_{method}"] = float(bool(reached))
    return out


def measure(seed: int, size: Size = Size()) -> Numbers:
    """The identity's rounding, what breaks it, and the compute of four methods."""
    spent = ledger(seed, size)
    return {
        **identity(seed),
        **spent,
        "rejection_over_sft": spent["flops_rejection"] / spent["flops_sft"],
        "grpo_over_rejection": spent["flops_grpo"] / spent["flops_rejection"],
        "distillation_over_rejection": spent["flops_distillation"] / spent["flops_rejection"],
    }


CLAIM = Claim(
    name="first_order",
    number=8,
    line="rejection sampling is the first-order case of the policy gradient, and the cheapest on-policy move",
    source="the chapter; the identity is in Zelikman et al. 2022 (STaR), arXiv:2203.14465, section 3",
    design=(
        "On a table in float64, 64 judged answers: the gradient of the library's accepted trajectories with hard "
        "targets, averaged over all sampled tokens, against the policy gradient with reward 1 or 0 written out. "
        "Predicted: they differ by less than 1e-12 of their size, as does the library's policy gradient; averaging "
        "over kept tokens breaks it by more than 0.1; after one update on the same draw it differs from the gradient "
        "with importance weights by more than 0.01 (it is the first order only). Then the network of claim 10, all "
        "prompts solvable, from pass@1 0.035 to 0.3, operations by the library's ledger, each method at the best of "
        "two rates: SFT on right answers, rejection sampling and GRPO with 4 samples a prompt, full-vocabulary "
        "on-policy distillation from a teacher of 0.6 (its training not counted). Predicted, from the order the "
        "sources give: rejection sampling costs more than SFT, and less than GRPO and than distillation."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="hard_targets_apart", what="accepted + hard targets, relative difference", below=1e-12),
        Prediction(name="policy_gradient_apart", what="the library's policy gradient, likewise", below=1e-12),
        Prediction(name="mean_over_kept_apart", what="averaged over kept tokens, likewise", above=0.1),
        Prediction(name="second_step_apart", what="on the second update, likewise", above=0.01),
        Prediction(name="rejection_over_sft", what="compute of rejection sampling over SFT's", above=1.0),
        Prediction(name="grpo_over_rejection", what="compute of GRPO over rejection sampling's", above=1.0),
        Prediction(
            name="distillation_over_rejection", what="compute of distillation over rejection sampling's", above=1.0
        ),
    ),
    seeds=(0, 1, 2, 3),
    minutes=2.0,
)
