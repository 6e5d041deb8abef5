"""The policy gradient against its definitions, by enumerating every group of completions of a tabular policy."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import ConfigError, DataError
from tutelage.policies.table import TablePolicy
from tutelage.signals import HardTargets
from tutelage.signals.policy_gradient import PolicyGradient
from tutelage.sources import Accepted, Keep
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Trainer, TrainerSettings
from tutelage.types import Draw, DrawContext, Group, Span, Status, Task, Trajectory, Verdict

torch.set_num_threads(1)
V, PROMPT = 3, 0
TASK = Task(id="t", messages=({"role": "user", "content": "?"},))
COMPLETIONS = [(a, b) for a in range(V) for b in range(V)]
GOOD = {(0, 1), (2, 2), (1, 0)}


def logprob(table: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """log p of a completion after the prompt token, and differentiable."""
    tokens = (PROMPT, *ids)
    return sum((table[:, a].log_softmax(0)[b] for a, b in itertools.pairwise(tokens)), start=torch.zeros(()).double())


def completion(
    ids: Sequence[int],
    reward: float | None,
    *,
    behaviour: Sequence[float] | None = None,
    weight: float = 1.0,
    finish: str = "stop",
    name: str = "t",
) -> Trajectory:
    status = Status.ERROR if reward is None else Status.ACCEPT if reward > 0 else Status.REJECT
    answer = Span(
        token_ids=tuple(ids),
        role="assistant",
        author="student",
        is_sampled=True,
        is_trainable=True,
        logprobs=tuple(behaviour) if behaviour is not None else (0.0,) * len(ids),
    )
    return Trajectory(
        id=name,
        task_id="t",
        task_hash=TASK.hash,
        spans=(Span(token_ids=(PROMPT,), role="user", author="user"), answer),
        completion=" ".join(map(str, ids)),
        verdict=Verdict(status=status, score=reward),
        weight=weight,
        finish=finish,
    )


def drawn(groups: Sequence[Sequence[Trajectory]]) -> Draw:
    return Draw(
        groups=tuple(Group(task=TASK, trajectories=tuple(g)) for g in groups), author="student", is_on_policy=True
    )


def trainer_of(policy: TablePolicy) -> Trainer:
    return Trainer(policy, Optimizer(policy.named_parameters(), kind="sgd"), processes=Processes())


def gradient(policy: TablePolicy, draw: Draw, signal: Any, **settings: Any) -> torch.Tensor:
    """What a step of plain descent moves the table by, per unit of learning rate."""
    trainer = trainer_of(policy)
    targets = signal.prepare(draw, score_student=trainer.score)
    before = policy.table_VD.detach().clone()
    config = TrainerSettings(**{"lr": 1.0, "batch_size": None, "max_grad_norm": None, **settings})
    trainer.step(targets.rows, signal, config, lr=1.0)
    moved = before - policy.table_VD.detach()
    policy.table_VD.data.copy_(before)
    return moved


def definition(kind: str, rewards: Sequence[float]) -> list[float]:
    """The advantages as the papers write them."""
    n, mean = len(rewards), sum(rewards) / len(rewards)
    same = len(set(rewards)) == 1
    if kind == "reinforce":
        return list(rewards)
    if kind == "reinforce_rej":
        return [0.0] * n if same else list(rewards)
    if kind == "rloo":
        return [n / (n - 1) * (r - mean) for r in rewards]
    if kind == "grpo_no_std":
        return [r - mean for r in rewards]
    if kind == "raft":
        return [float(r == max(rewards) and r > 0) for r in rewards]
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / n)
    return [0.0] * n if same else [(r - mean) / std for r in rewards]


KINDS = ("reinforce", "reinforce_rej", "raft", "rloo", "grpo", "grpo_no_std")


def enumerated(policy: TablePolicy, size: int, reward: str) -> tuple[Draw, list[Any]]:
    """Every group of `size` completions, each weighted by its probability."""
    with torch.no_grad():
        p = {c: float(logprob(policy.table_VD, c).exp()) for c in COMPLETIONS}
    groups, parts = [], []
    for chosen in itertools.product(COMPLETIONS, repeat=size):
        mass = math.prod(p[c] for c in chosen)
        r = [float(c in GOOD) for c in chosen]
        groups.append([completion(c, x, weight=mass) for c, x in zip(chosen, r, strict=True)])
        parts.append((mass, chosen, r if reward == "accepted" else [2 * x - 1 for x in r]))
    return drawn(groups), parts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "reward"), [(2, "accepted"), (3, "signed")])
def test_the_expected_gradient_is_the_definitions(kind: str, size: int, reward: str) -> None:
    """Over all groups: -E[(1/G) sum_i A_i grad log p(y_i)]; with one group's advantages worked out by hand."""
    policy = TablePolicy(V, seed=3)
    draw, parts = enumerated(policy, size, reward)
    signal = PolicyGradient(kind, reward=reward, clip=None, sampler_cap=None, normalise="sequences")  # type: ignore
    got = gradient(policy, draw, signal) * len(parts)  # the step divides by groups * size; masses sum to 1
    table = policy.table_VD.detach().clone().requires_grad_()
    logps = {c: logprob(table, c) for c in COMPLETIONS}
    objective = sum(
        mass / size * sum(a * logps[c] for c, a in zip(chosen, definition(kind, r), strict=True))
        for mass, chosen, r in parts
    )
    (-objective).backward()
    torch.testing.assert_close(got, table.grad, rtol=1e-10, atol=1e-12)
    if kind in ("reinforce", "rloo", "grpo_no_std"):  # and these are the expected reward's, up to a constant
        table2 = policy.table_VD.detach().clone().requires_grad_()
        low = -1.0 if reward == "signed" else 0.0
        value = sum(logprob(table2, c).exp() * (1.0 if c in GOOD else low) for c in COMPLETIONS)
        (-value).backward()
        factor = (size - 1) / size if kind == "grpo_no_std" else 1.0
        torch.testing.assert_close(got, factor * table2.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["grpo", "grpo_no_std", "reinforce_rej", "rloo"])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_groups_of_equal_rewards_give_exactly_zero(kind: str, reward: float) -> None:
    policy = TablePolicy(V)
    same = [completion(c, reward, name=f"t{i}") for i, c in enumerate(COMPLETIONS[:4])]
    targets = PolicyGradient(kind).prepare(drawn([same]), score_student=trainer_of(policy).score)  # type: ignore
    assert not any(r.is_trained for r in targets.rows) and sum(r.count for r in targets.rows) == 8
    assert torch.equal(gradient(policy, drawn([same]), PolicyGradient(kind)), torch.zeros(V, V + 1).double())  # type: ignore


def test_completions_of_advantage_zero_count_in_the_divisor() -> None:
    """A mixed group beside an all-right one: half the step's completions, half the gradient."""
    policy = TablePolicy(V)
    mixed = [completion((0, 1), 1.0), completion((1, 1), 0.0)]
    same = [completion((0, 1), 1.0), completion((2, 2), 1.0)]
    alone, beside = (gradient(policy, drawn(g), PolicyGradient("grpo")) for g in ([mixed], [mixed, same]))
    assert alone.abs().max() > 0.01
    torch.testing.assert_close(beside, alone / 2, rtol=1e-12, atol=1e-14)


def test_an_error_leaves_the_statistics_and_the_divisor() -> None:
    policy = TablePolicy(V)
    clean = [completion((0, 1), 1.0), completion((1, 1), 0.0), completion((2, 0), 0.0)]
    with_error = [*clean, completion((2, 1), None)]
    for kind in KINDS:
        signal = PolicyGradient(kind, normalise="sequences")  # type: ignore[arg-type]
        assert signal.advantages(drawn([with_error]))[0][:3] == signal.advantages(drawn([clean]))[0]
        a, b = gradient(policy, drawn([clean]), signal), gradient(policy, drawn([with_error]), signal)
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_truncated_completions_are_kept_masked_or_dropped_as_stated() -> None:
    group = [
        completion((0, 1), 1.0),
        completion((1, 1), 0.0),
        completion((2, 0), 0.0, finish="length"),
    ]
    got = {}
    for how in ("keep", "mask", "drop"):
        signal = PolicyGradient("grpo_no_std", truncated=how, normalise="sequences")  # type: ignore[arg-type]
        targets = signal.prepare(drawn([group]), score_student=trainer_of(TablePolicy(V)).score)
        got[how] = ([round(r.columns["advantage_C"][0], 6) for r in targets.rows], sum(r.count for r in targets.rows))
    third = round(1 / 3, 6)
    assert got["keep"] == ([round(2 / 3, 6), -third, -third], 3)
    assert got["mask"] == ([round(2 / 3, 6), -third], 2)
    assert got["drop"] == ([0.5, -0.5], 2)


# -- ratios -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truncated", "advantage", "rewards", "cut", "expected"),
    [
        ("drop", "grpo", [1.0, 1.0, 0.0], [2], False),  # all the same once the cut one is out
        ("drop", "grpo", [1.0, 0.0, 0.0], [2], True),
        ("mask", "grpo", [1.0, 1.0, 0.0], [2], True),  # the cut one is in the baseline
        ("mask", "grpo", [1.0, 1.0, 0.0], [0, 1, 2], False),  # nobody is trained
        ("mask", "raft", [1.0, 0.0, 0.0], [0], False),  # only the cut one has an advantage
        ("keep", "grpo", [1.0, 1.0, 0.0], [2], True),
        ("keep", "reinforce", [1.0, 1.0, 1.0], [], False),
        ("keep", "grpo", [1.0, 1.0, None], [], False),
    ],
)
def test_a_group_is_useful_where_a_trained_completion_has_an_advantage(
    truncated: Any, advantage: Any, rewards: list[float | None], cut: list[int], expected: bool
) -> None:
    ts = [completion((1, 2), r, finish="length" if i in cut else "stop") for i, r in enumerate(rewards)]
    signal = PolicyGradient(advantage, truncated=truncated)
    draw = drawn([ts])
    assert signal.is_useful(draw.groups[0]) == expected
    if advantage != "reinforce":  # which learns from a group of one outcome too
        rows = signal.prepare(draw, score_student=lambda found: [[0.0] * t.num_targets for t in found]).rows
        assert any(r.is_trained and r.columns["advantage_C"].any() for r in rows) == expected


def test_scores_that_differ_by_rounding_are_the_same() -> None:
    ts = [completion((1, 2), r) for r in (0.3, 0.1 + 0.2)]
    for kind in ("grpo", "grpo_no_std", "rloo", "reinforce_rej"):
        signal = PolicyGradient(kind, reward="score")  # type: ignore[arg-type]
        assert signal.advantages(drawn([ts])) == [[0.0, 0.0]] and not signal.is_useful(drawn([ts]).groups[0])
    assert PolicyGradient("raft", reward="score").advantages(drawn([ts])) == [[1.0, 1.0]]  # a tie for the best


def test_ratios_use_the_trainers_own_numbers_and_the_sampler_is_corrected_apart() -> None:
    """After an update: loss and gradient against a transcription, the sampler's report being off by a constant."""
    sampled, now = TablePolicy(V, seed=1), TablePolicy(V, seed=1)
    now.table_VD.data += 0.3 * torch.randn(V, V + 1, generator=torch.Generator().manual_seed(7)).double()
    off = (0.2, 1.5)  # p_old / p_sampler of the first and the second token: the second is cut
    ids = [(0, 1), (1, 1), (2, 0)]
    rewards = [1.0, 0.0, 1.0]
    with torch.no_grad():
        old = [
            [float(sampled.table_VD[:, a].log_softmax(0)[b]) for a, b in itertools.pairwise((PROMPT, *c))] for c in ids
        ]
    group = [
        completion(c, r, behaviour=[x - o for x, o in zip(lp, off, strict=True)])
        for c, r, lp in zip(ids, rewards, old, strict=True)
    ]
    signal = PolicyGradient("grpo", clip=(0.1, 0.15), sampler_cap=2.0, normalise="tokens")
    targets = signal.prepare(drawn([group]), score_student=trainer_of(sampled).score)
    before = now.table_VD.detach().clone()
    trainer_of(now).step(targets.rows, signal, TrainerSettings(lr=1.0, batch_size=None, max_grad_norm=None), lr=1.0)
    table = before.clone().requires_grad_()
    total, cut = torch.zeros(()).double(), 0
    for c, a, lps in zip(ids, definition("grpo", rewards), old, strict=True):
        for (x, y), lp, o in zip(itertools.pairwise((PROMPT, *c)), lps, off, strict=True):
            s = (table[:, x].log_softmax(0)[y] - lp).exp()
            total = total - min(math.exp(o), 2.0) * torch.minimum(s * a, s.clamp(0.9, 1.15) * a)
            cut += bool(s.detach().clamp(0.9, 1.15) != s.detach())
    assert cut >= 2, "the case must reach the clip"
    (total / 6).backward()
    torch.testing.assert_close(before - now.table_VD.detach(), table.grad, rtol=1e-10, atol=1e-12)
    assert targets.stats["policy/mean_abs_sampler_gap_nats"] == pytest.approx(0.85)


def test_raft_with_a_clip_is_likelihood_of_the_best_on_the_first_update_and_clipped_after() -> None:
    sampled = TablePolicy(V, seed=2)
    group = [completion(c, float(c in GOOD), name=f"t{i}") for i, c in enumerate(COMPLETIONS[:6])]
    signal = PolicyGradient("raft", clip=(0.2, 0.2), sampler_cap=None)
    kept = Accepted(_Fixed(drawn([group])), Keep(distinct=None)).draw(DrawContext(seed=0, stage=0, round=0))
    first = gradient(sampled, drawn([group]), signal)
    torch.testing.assert_close(first, gradient(sampled, kept, HardTargets(divisor="sampled")), rtol=1e-12, atol=1e-14)
    targets = signal.prepare(drawn([group]), score_student=trainer_of(sampled).score)
    moved = TablePolicy(V, seed=2)
    moved.table_VD.data[1, 0] += 3.0  # the first token of an accepted completion is now far likelier
    ids = torch.tensor([1])
    logits = moved.table_VD[:, 0].detach().clone().requires_grad_()
    row = next(r for r in targets.rows if r.trajectory.completion == "1 0")
    columns = {"target_ids_C": ids, **{k: torch.tensor(v[:1]) for k, v in row.columns.items()}}
    loss = signal.loss(logits.unsqueeze(0), columns)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(-1.2) and torch.equal(logits.grad, torch.zeros(V).double())


class _Fixed:
    def __init__(self, draw: Draw) -> None:
        self.fixed = draw

    def draw(self, ctx: DrawContext) -> Draw:
        return self.fixed

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None: ...


def test_the_kl_term_is_the_divergence_to_base_by_enumeration() -> None:
    """No reward: only the KL moves the policy, by the gradient of the divergence at each position reached."""
    policy, base = TablePolicy(V, seed=1), TablePolicy(V, seed=5)
    with torch.no_grad():
        mass = {c: float(logprob(policy.table_VD, c).exp()) for c in COMPLETIONS}
    group = [completion(c, 0.0, weight=mass[c]) for c in COMPLETIONS]
    signal = PolicyGradient("grpo", clip=None, sampler_cap=None, kl_coef=0.7, base=_Scorer(base), normalise="sequences")
    got = gradient(policy, drawn([group]), signal) * len(COMPLETIONS)
    table = policy.table_VD.detach().clone().requires_grad_()
    p, q = table.log_softmax(0), base.table_VD.detach().log_softmax(0)
    kl_D = (p.exp() * (p - q)).sum(0)
    reached = p[:, PROMPT].exp().detach()
    (0.7 * (kl_D[PROMPT] + (reached * kl_D[:V]).sum())).backward()
    torch.testing.assert_close(got, table.grad, rtol=1e-10, atol=1e-12)


class _Scorer:
    name, is_fixed = "base", True

    def __init__(self, policy: TablePolicy) -> None:
        self.trainer = trainer_of(policy)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Sequence[float]]:
        return self.trainer.score(trajectories)


# -- the step -----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.sampled_from(["packed", "padded"]),
    st.sampled_from(["tokens", "sequence_means", "sequences"]),
    st.integers(1, 9),
    st.permutations(range(6)),
)
def test_a_step_does_not_depend_on_plumbing(
    max_tokens: int, layout: str, normalise: str, chunk: int, order: list[int]
) -> None:
    lengths = [(0,), (1, 2, 0), (2, 2), (1, 0, 0, 1), (0, 1), (2,)]
    group = [completion(c, float(i % 3 == 0), name=f"t{i}") for i, c in enumerate(lengths)]
    signal = PolicyGradient("grpo", normalise=normalise, sampler_cap=50.0)  # type: ignore[arg-type]
    results = []
    for policy, config, chosen in (
        (TablePolicy(V), {"max_tokens": 10_000, "layout": "padded"}, range(6)),
        (TablePolicy(V, chunk_size=chunk), {"max_tokens": max_tokens, "layout": layout}, order),
    ):
        trainer = trainer_of(policy)
        targets = signal.prepare(drawn([group]), score_student=trainer.score)
        rows = [targets.rows[i] for i in chosen]
        metrics = trainer.step(rows, signal, TrainerSettings(lr=1.0, batch_size=None, **config), lr=1.0)  # type: ignore
        results.append((metrics["train/loss"], policy.table_VD.detach()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-10)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-12)


def test_normalisation_says_what_long_completions_weigh() -> None:
    short, long = completion((1,), 1.0), completion((1, 0, 0, 2), 0.0)
    for how, count, weights in (
        ("tokens", 5.0, (1.0, 1.0)),
        ("sequence_means", 2.0, (1.0, 0.25)),
        ("sequences", 2.0, (1.0, 1.0)),
    ):
        signal = PolicyGradient("grpo", normalise=how)  # type: ignore[arg-type]
        rows = signal.prepare(drawn([[short, long]]), score_student=trainer_of(TablePolicy(V)).score).rows
        assert sum(r.count for r in rows) == count
        assert tuple(r.columns["weight_C"][0] for r in rows) == weights


# -- bad input ----------------------------------------------------------------------------------


def test_what_it_cannot_do_is_refused_with_what_to_do() -> None:
    score = trainer_of(TablePolicy(V)).score
    draw = drawn([[completion((0, 1), 1.0), completion((1, 1), 0.0)]])
    with pytest.raises(DataError, match=r"not on-policy\. Set draw_from=current"):
        PolicyGradient().prepare(replace(draw, is_on_policy=False), score_student=score)
    unjudged = drawn([[replace(completion((0, 1), 1.0), verdict=None)]])
    with pytest.raises(DataError, match="has no verdict"):
        PolicyGradient().prepare(unjudged, score_student=score)
    t = completion((0, 1), 1.0)
    changed = replace(t, spans=(t.spans[0], replace(t.spans[1], is_context_exact=False)))
    with pytest.raises(DataError, match="context changed"):
        PolicyGradient().prepare(drawn([[changed, completion((1, 1), 0.0)]]), score_student=score)
    with pytest.raises(ConfigError) as caught:
        PolicyGradient("grop", clip=(2.0, 0.1), sampler_cap=0.5, kl_coef=0.1, ddof=2)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 5
    with pytest.raises(ConfigError, match=r"needs recompute=True; clip=None uses no ratio"):
        PolicyGradient("grpo", recompute=False)
