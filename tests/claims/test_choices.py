"""The world of choices: exact scores against enumeration and sampling, arms against their definitions."""

import itertools

import pytest
import torch

from tutelage.claims.choices import (
    STEPS,
    TOKENS,
    World,
    advantages,
    copy_of,
    logits,
    network,
    prompts,
    reinforce,
    sample,
    score,
    weak_base,
)


@pytest.fixture(scope="module")
def world():
    return World.of(3)


@pytest.fixture
def x_PD():
    return prompts(5, torch.Generator().manual_seed(0))


def test_exact_scores_are_the_sums_over_all_answers(world, x_PD):
    policy = network(1)
    logprobs_PSV = logits(policy, x_PD).detach().log_softmax(-1)
    answers = torch.tensor(list(itertools.product(range(TOKENS), repeat=STEPS)))
    all_PGS = answers.expand(len(x_PD), -1, -1)
    is_right_PG = world.is_right(x_PD, all_PGS)
    assert is_right_PG.sum(-1).tolist() == [2**STEPS] * len(x_PD)
    probs_PG = sum(logprobs_PSV[:, s, answers[:, s]] for s in range(STEPS)).exp()
    right_P = (probs_PG * is_right_PG).sum(-1)
    found = score(policy, world, x_PD)
    torch.testing.assert_close(found.right_P, right_P)
    assert found.pass_at(3) == pytest.approx(float((1 - (1 - right_P.double()) ** 3).mean()), rel=1e-5)
    entropy = -(logprobs_PSV.exp() * logprobs_PSV).sum(-1).mean()
    assert found.entropy == pytest.approx(float(entropy), rel=1e-5)
    best_PS = all_PGS[0][probs_PG.argmax(-1)][:, None]
    assert found.greedy == pytest.approx(float(world.is_right(x_PD, best_PS).float().mean()))


def test_samples_are_as_likely_as_they_should_be(world, x_PD):
    policy = network(2)
    answers_PGS = sample(logits(policy, x_PD), 20_000, torch.Generator().manual_seed(1))
    share_P = world.is_right(x_PD, answers_PGS).float().mean(-1)
    expected_P = score(policy, world, x_PD).right_P
    assert (share_P - expected_P).abs().max() < 5 * float((expected_P / 20_000).sqrt().max())


def test_a_cold_sampler_takes_the_likeliest(world, x_PD):
    logits_PSV = logits(network(2), x_PD)
    cold_PGS = sample(logits_PSV, 7, torch.Generator().manual_seed(1), temperature=1e-4)
    assert torch.equal(cold_PGS, logits_PSV.argmax(-1)[:, None].expand(-1, 7, -1))


GROUPS = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("reinforce", [[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, -1, -1]]),
        ("drop_all_right", [[0, 0, 0, 0], [-1, -1, -1, -1], [1, -1, -1, -1]]),
        ("drop_all_wrong", [[1, 1, 1, 1], [0, 0, 0, 0], [1, -1, -1, -1]]),
        ("drop_same", [[0, 0, 0, 0], [0, 0, 0, 0], [1, -1, -1, -1]]),
        ("drop_same_std", [[0, 0, 0, 0], [0, 0, 0, 0], [v / 0.75**0.5 for v in (1, -1, -1, -1)]]),
        ("mean_zero", [[0, 0, 0, 0], [0, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]]),
        ("grpo", [[0, 0, 0, 0], [0, 0, 0, 0], [v / 0.75**0.5 for v in (1.5, -0.5, -0.5, -0.5)]]),
        ("raft", [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]),
        ("raft_drop_all_right", [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]),
    ],
)
def test_arms(arm, expected):
    torch.testing.assert_close(advantages(arm, GROUPS), torch.tensor(expected, dtype=torch.float32))


def test_drop_same_std_divides_by_the_groups_std():
    rewards = torch.tensor([1.0, -1.0, -1.0, -1.0])
    expected = rewards / rewards.std(unbiased=False)
    torch.testing.assert_close(advantages("drop_same_std", GROUPS)[2], expected)


def test_an_update_raises_what_was_accepted(world):
    generator = torch.Generator().manual_seed(4)
    base = weak_base(5, world, until=0.03)
    x_PD = prompts(64, generator)
    policy = copy_of(base, lambda: network(5))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = score(policy, world, x_PD).pass_at(1)
    for _ in range(20):
        reinforce(policy, optimizer, world, x_PD, generator, arm="raft")
    assert score(policy, world, x_PD).pass_at(1) > 1.1 * before
    assert score(base, world, x_PD).pass_at(1) == before  # the copy was trained, not the base


def test_nothing_is_accepted_where_nothing_is_solvable(world):
    generator = torch.Generator().manual_seed(4)
    policy, x_PD = network(5), prompts(64, generator)
    never_P = torch.zeros(64, dtype=torch.bool)
    weights = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    is_right_PG = reinforce(policy, optimizer, world, x_PD, generator, arm="grpo", solvable_P=never_P)
    assert not is_right_PG.any()
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters(), strict=True))


def test_the_first_of_several_updates_is_the_plain_one(world):
    x_PD = prompts(64, torch.Generator().manual_seed(4))
    after = []
    for updates in (1, 4):
        policy = network(5)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
        generator = torch.Generator().manual_seed(6)
        reinforce(policy, optimizer, world, x_PD, generator, arm="mean_zero", updates=updates)
        after.append(score(policy, world, x_PD).entropy)
    start = score(network(5), world, x_PD).entropy
    assert after[0] != start and abs(after[1] - start) != abs(after[0] - start)
