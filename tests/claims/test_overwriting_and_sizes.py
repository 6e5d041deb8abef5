"""The experiments on forgetting: their parts against what they are named after, and a run too small to judge."""

import math

import pytest
import torch

from tutelage.claims import overwriting, small_models
from tutelage.claims.razor import ARMS, RazorSize, World, arm_loss, at_target, fine_tune, pretrain, r_squared, state_of

TINY = RazorSize(target=0.75, rates=(3e-3,), batch=64, pretraining=40, most_steps=120, check_every=10)


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def base(world):
    return pretrain(world, 16, TINY)


def test_half_the_labels_are_right_and_they_share_their_parity(world):
    right_BV = world.is_right(torch.arange(10))
    assert right_BV.sum(-1).tolist() == [5] * 10
    assert (right_BV[:, 0] != right_BV[:, 1]).all()
    assert right_BV[:, 0].sum() == 5  # as many classes of either parity


def gradient(arm, logits_BV, base_BV, right_BV, draws=1):
    logits_BV = logits_BV.clone().requires_grad_()
    rng = torch.Generator().manual_seed(0)
    for _ in range(draws):
        (arm_loss(arm, logits_BV, base_BV, right_BV, rng).sum() / draws).backward()
    return logits_BV.grad


def test_every_imitation_arm_learns_right_labels_only(world):
    right_BV = world.is_right(torch.arange(10))
    logits_BV = torch.zeros(10, 10)
    base_BV = torch.zeros(10, 10)
    for arm, most in (("sft_fixed", 1), ("sft_two", 2), ("oracle", 5)):
        pushed_up = gradient(arm, logits_BV, base_BV, right_BV, draws=64) < 0
        assert not (pushed_up & ~right_BV).any()
        assert (pushed_up.sum(-1) == most).all(), arm


@pytest.mark.parametrize("arm", ["reinforce", "reinforce_baseline"])
def test_reinforce_follows_the_expected_reward(arm, world):
    right_BV = world.is_right(torch.arange(10)).repeat(40, 1)
    logits_BV = torch.randn(10, 10, generator=torch.Generator().manual_seed(2)).repeat(40, 1)
    got_V = gradient(arm, logits_BV, logits_BV, right_BV, draws=400).view(40, 10, 10).mean(0)
    p_BV = logits_BV[:10].softmax(-1)
    expected_BV = -p_BV * (right_BV[:10].float() - (p_BV * right_BV[:10]).sum(-1, keepdim=True))
    assert (got_V - expected_BV).abs().max() < 0.02 < expected_BV.abs().max()


def test_the_oracle_is_the_nearest_solution(world):
    """KL(oracle || base) = -ln p(right), and no distribution over right labels is nearer."""
    right_V = world.is_right(torch.tensor([3]))[0]
    base_V = torch.randn(10, generator=torch.Generator().manual_seed(3))
    logits_V = base_V.masked_fill(~right_V, -30.0).clone().requires_grad_()
    assert gradient("oracle", logits_V.detach()[None], base_V[None], right_V[None]).abs().max() < 1e-6
    oracle_V = base_V.masked_fill(~right_V, -torch.inf).softmax(-1)
    kl = float((oracle_V[right_V] * (oracle_V[right_V].log() - base_V.log_softmax(-1)[right_V])).sum())
    assert kl == pytest.approx(-math.log(float(base_V.softmax(-1)[right_V].sum())), abs=1e-5)


def test_arms_start_at_the_base_and_stop_exactly_at_the_target(world, base):
    before = [p.clone() for p in base.parameters()]
    for arm in ARMS:
        states = fine_tune(arm, base, world, lr=3e-3, size=TINY)
        assert states[0]["forward_kl"] == states[0]["reverse_kl"] == states[0]["weights_l2"] == 0
        assert states[-1]["new"] == pytest.approx(TINY.target)
        assert all(s["new"] < TINY.target for s in states[:-1])
        assert states[-1]["forward_kl"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))


def test_the_state_at_the_target_lies_between_its_neighbours():
    before, after = {"new": 0.8, "old": 1.0}, {"new": 1.0, "old": 0.6}
    assert at_target(before, after, 0.9) == pytest.approx({"new": 0.9, "old": 0.8})


def test_r_squared_is_one_for_a_parabola_and_nothing_for_noise():
    x = torch.linspace(0, 1, 200).tolist()
    assert r_squared(x, [v**2 - v for v in x]) == pytest.approx(1.0)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    assert r_squared(x, noise) < 0.1


def test_drift_is_measured_from_the_base(world, base):
    """KL(base || model) is the forward one: infinite in the limit where the model has lost a label of the base."""
    moved = torch.nn.Sequential(*base)
    state = state_of(moved, base, world)
    assert state["forward_kl"] == 0
    with torch.no_grad():
        lost = pretrain(World(1), 16, RazorSize(pretraining=0))
        lost.load_state_dict(base.state_dict())
        lost[-1].bias[4] -= 50.0
    state = state_of(lost, base, world)
    assert state["forward_kl"] > 5 * state["reverse_kl"] > 0


def test_a_small_run_gives_every_number_that_is_predicted():
    found = overwriting.measure(0, TINY)
    assert found == overwriting.measure(0, TINY)
    assert found["least_reached"] == 1.0
    overwriting.CLAIM.judge([found, found])
    size = small_models.Size(**{**TINY.__dict__, "widths": (8, 16)})
    sizes = small_models.measure(0, size)
    small_models.CLAIM.judge([sizes, sizes])
    assert sizes["lost_sft_two_smallest_over_largest"] == pytest.approx(
        sizes["lost_sft_two_8"] - sizes["lost_sft_two_16"]
    )
    assert sizes["lost_sft_two_per_doubling"] == pytest.approx(sizes["lost_sft_two_16"] - sizes["lost_sft_two_8"])


@pytest.mark.slow
def test_the_claim_on_overwriting_as_published():
    claim = overwriting.CLAIM
    assert claim.judge([claim.measure(s) for s in claim.seeds]).verdict == "holds"


@pytest.mark.slow
def test_one_seed_over_the_sizes_of_model():
    found = small_models.measure(0)
    assert found["least_reached"] == 1.0
    assert all(found[f"base_old_{width}"] > 0.9 for width in small_models.Size().widths)
