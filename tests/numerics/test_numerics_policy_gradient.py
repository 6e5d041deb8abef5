import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_oracles import quick, sequences

from tutelage import numerics
from tutelage.errors import ConfigError, DataError
from tutelage.testing import shapes_match_names

reinforce_loss = shapes_match_names(numerics.reinforce_loss)
clipped_ratio_loss = shapes_match_names(numerics.clipped_ratio_loss)
clipped_likelihood_loss = shapes_match_names(numerics.clipped_likelihood_loss)
sampler_weight = shapes_match_names(numerics.sampler_weight)
sampled_reverse_kl = shapes_match_names(numerics.sampled_reverse_kl)
kl_estimates = shapes_match_names(numerics.kl_estimates)

V = 5


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def cosine_and_ratio(a, b):
    return (a @ b / (a.norm() * b.norm())).item(), (a.norm() / b.norm()).item()


# -- by enumeration: the expected gradient is the divergence's -------------------------------


class OnePosition:
    """All V tokens at one position, each with the probability it is sampled with."""

    def __init__(self, seed=0):
        self.logits = randn(V, seed=seed).requires_grad_()
        self.teacher_logits = randn(V, seed=seed + 1) * 1.5
        self.teacher = self.teacher_logits.log_softmax(-1)

    def expected_gradient(self, loss_of_logprobs, behaviour=None):
        """sum_y p(y) grad loss(y): what an infinite number of samples would give."""
        logprobs = self.logits.log_softmax(-1)
        sampled_from = (logprobs if behaviour is None else behaviour).detach().exp()
        return torch.autograd.grad((sampled_from * loss_of_logprobs(logprobs)).sum(), self.logits)[0]

    def exact_gradient(self, divergence):
        value = divergence(self.logits[None, None], self.teacher_logits[None, None])
        return torch.autograd.grad(value.sum(), self.logits)[0]


@pytest.mark.parametrize("seed", range(4))
def test_sampled_reverse_kl_has_the_gradient_and_value_of_reverse_kl(seed):
    one = OnePosition(seed)
    got = one.expected_gradient(lambda s: sampled_reverse_kl(s, one.teacher))
    assert cosine_and_ratio(got, one.exact_gradient(numerics.reverse_kl)) == pytest.approx((1, 1), abs=1e-12)
    s = one.logits.detach().log_softmax(-1)
    value = (s.exp() * sampled_reverse_kl(s, one.teacher)).sum()
    torch.testing.assert_close(value, numerics.reverse_kl(one.logits, one.teacher_logits).detach())


@pytest.mark.parametrize("seed", range(4))
def test_sampled_reverse_kl_off_policy_is_corrected_by_the_ratio_and_biased_without(seed):
    one = OnePosition(seed)
    behaviour = randn(V, seed=seed + 50).log_softmax(-1)
    exact = one.exact_gradient(numerics.reverse_kl)
    right = one.expected_gradient(
        lambda s: sampled_reverse_kl(s, one.teacher, behaviour_logprobs_N=behaviour), behaviour
    )
    assert cosine_and_ratio(right, exact) == pytest.approx((1, 1), abs=1e-12)
    wrong = one.expected_gradient(lambda s: sampled_reverse_kl(s, one.teacher), behaviour)
    assert cosine_and_ratio(wrong, exact) != pytest.approx((1, 1), abs=1e-2)


def test_the_pairs_that_fail_really_fail():
    """What no function here offers: k1 has no gradient, k3's is the forward KL's, k3 as an advantage is neither."""
    one = OnePosition()
    forward, reverse = one.exact_gradient(numerics.forward_kl), one.exact_gradient(numerics.reverse_kl)

    def k3(s):
        return (one.teacher - s).exp() - 1 - (one.teacher - s)

    k1 = one.expected_gradient(lambda s: s - one.teacher)
    assert k1.abs().max() < 1e-12 < reverse.abs().max()
    k2 = one.expected_gradient(lambda s: (s - one.teacher) ** 2 / 2)
    assert cosine_and_ratio(k2, reverse) == pytest.approx((1, 1), abs=1e-12)
    k3_backprop = one.expected_gradient(k3)
    assert cosine_and_ratio(k3_backprop, forward) == pytest.approx((1, 1), abs=1e-12)
    assert cosine_and_ratio(k3_backprop, reverse)[0] < 0.99
    k3_advantage = one.expected_gradient(lambda s: k3(s).detach() * s)
    assert cosine_and_ratio(k3_advantage, reverse)[0] < 0.95


def test_top_k_reverse_kl_without_its_tail_and_sampled_token_with_tail_fail():
    one = OnePosition()
    exact = one.exact_gradient(numerics.reverse_kl)
    logprobs, ids = one.teacher.topk(2)

    def gradient(f):
        return torch.autograd.grad(f(one.logits.log_softmax(-1)), one.logits)[0]

    no_tail = gradient(lambda s: (s[ids].exp() * (s[ids] - logprobs)).sum())
    with_tail = gradient(
        lambda s: numerics.top_k_kl(
            one.logits[None, None], ids[None, None], logprobs[None, None], direction="reverse"
        ).sum()
    )
    assert cosine_and_ratio(with_tail, exact)[0] > cosine_and_ratio(no_tail, exact)[0]

    def two_buckets(s):
        t = one.teacher
        rest_s, rest_t = (1 - s.exp()).log(), (1 - t.exp()).log()
        return s.exp() * (s - t) + rest_s.exp() * (rest_s - rest_t)

    assert cosine_and_ratio(one.expected_gradient(two_buckets), exact) != pytest.approx((1, 1), abs=0.05)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
def test_every_divergence_has_the_gradient_of_its_definition(name):
    """The definitions once more in differentiable form, on probabilities."""
    one = OnePosition()
    p, q = one.teacher.exp(), one.logits.softmax(-1)

    def kl(a, b):
        return (a * (a.log() - b.log())).sum()

    definition = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
        "skew_kl": kl(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": kl(q, 0.9 * p + 0.1 * q),
    }[name]
    exact = torch.autograd.grad(definition, one.logits)[0]
    assert cosine_and_ratio(one.exact_gradient(getattr(numerics, name)), exact) == pytest.approx((1, 1), abs=1e-12)


class Sequences:
    """A tabular student and teacher over all sequences of 3 tokens of length 3."""

    def __init__(self):
        self.params = [randn(3, seed=1).requires_grad_(), randn(3, 3, seed=2).requires_grad_(), randn(3, 3, 3, seed=3)]
        self.params[2].requires_grad_()
        self.teacher = [randn(3, seed=4), randn(3, 3, seed=5), randn(3, 3, 3, seed=6)]
        self.all = sequences(3, 3)

    @staticmethod
    def tokens(tables, seq):
        i, j, k = seq
        a, b, c = tables
        return torch.stack([a.log_softmax(-1)[i], b[i].log_softmax(-1)[j], c[i, j].log_softmax(-1)[k]])

    def both(self, seq):
        return self.tokens(self.params, seq), self.tokens(self.teacher, seq)


@pytest.mark.parametrize("discount", [1.0, 0.0])
def test_with_future_sums_the_expected_gradient_is_that_of_the_whole_sequence(discount):
    """Discount 1 is KL of whole sequences; discount 0 the sum over positions of each one's own, prefixes held fixed."""
    world, exact, estimate = Sequences(), 0.0, 0.0
    for seq in world.all:
        s, t = world.both(seq)
        p = s.sum().exp()
        d = (s - t).detach()
        future = f64(numerics.future_sums(d.tolist(), discount=discount))
        estimate = estimate + p.detach() * sampled_reverse_kl(s, t, future_N=future).sum()
        if discount == 1:
            exact = exact + p * (s.sum() - t.sum())
        else:
            prefix = torch.cat([torch.zeros(1, dtype=torch.float64), s.cumsum(0)[:-1]]).detach().exp()
            rest = p.detach() / (prefix * s.detach().exp())  # so that each prefix and token counts once
            exact = exact + (prefix * s.exp() * (s - t) * rest).sum()
    wanted = torch.autograd.grad(exact, world.params, retain_graph=True)
    for a, b in zip(torch.autograd.grad(estimate, world.params), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def expected_over_groups(kind, n, rewards, logits):
    """Sum over all n-tuples of tokens of p(tuple) * sum_i loss_i / n."""
    logprobs = logits.log_softmax(-1)
    total = 0.0
    for group in itertools.product(range(len(rewards)), repeat=n):
        ids = list(group)
        advantages = f64(numerics.group_advantages([[rewards[i] for i in ids]], kind)[0])
        p = logprobs[ids].sum().exp().detach()
        total = total + p * reinforce_loss(logprobs[ids], advantages).sum() / n
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize(("kind", "factor"), [("reinforce", 1.0), ("rloo", 1.0), ("grpo_no_std", 2 / 3)])
def test_expected_gradient_is_that_of_the_expected_reward(kind, factor):
    logits, rewards = randn(3, seed=3).requires_grad_(), [1.0, 0.0, 0.3]
    exact = torch.autograd.grad(-(logits.softmax(-1) @ f64(rewards)), logits)[0]
    got = expected_over_groups(kind, 3, rewards, logits)
    torch.testing.assert_close(got, exact * factor, rtol=1e-10, atol=1e-12)


def test_accepted_likelihood_over_sampled_tokens_is_the_policy_gradient_and_over_accepted_is_not():
    """Reward 0 or 1, four samples: weight 1 on accepted tokens, divided by all sampled; each group counts alike."""
    logits, accepted = randn(4, seed=3).requires_grad_(), [1.0, 0.0, 0.0, 1.0]
    exact = torch.autograd.grad(-(logits.softmax(-1) @ f64(accepted)), logits)[0]
    by_sampled, by_accepted = 0.0, 0.0
    identity = torch.eye(4, dtype=torch.float64)
    for group in itertools.product(range(4), repeat=2):
        ids = torch.tensor(group)
        weight = f64(numerics.group_advantages([[accepted[i] for i in group]], "accepted")[0])
        p = logits.log_softmax(-1)[ids].sum().exp().detach()
        columns = {"target_ids_C": ids, "weight_C": weight}

        def loss(divisor, columns=columns):
            hidden = logits[None].expand(2, 4)
            return numerics.chunked_loss(hidden, identity, columns, numerics.cross_entropy, divisor=divisor)[0]

        by_sampled = by_sampled + p * loss(2)
        by_accepted = by_accepted + p * loss(max(1.0, weight.sum().item()))
    torch.testing.assert_close(torch.autograd.grad(by_sampled, logits)[0], exact, rtol=1e-10, atol=1e-12)
    assert cosine_and_ratio(torch.autograd.grad(by_accepted, logits)[0], exact)[1] > 1.1


# -- advantages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("reinforce", [1.0, -1.0, -1.0, 1.0, -1.0]),
        ("reinforce_rej", [1.0, -1.0, -1.0, 1.0, -1.0]),
        ("raft", [1.0, 0.0, 0.0, 1.0, 0.0]),
        ("accepted", [1.0, 0.0, 0.0, 1.0, 0.0]),
        ("rloo", [1.5, -1.0, -1.0, 1.5, -1.0]),
        ("grpo", [math.sqrt(1.5), -math.sqrt(2 / 3), -math.sqrt(2 / 3), math.sqrt(1.5), -math.sqrt(2 / 3)]),
        ("grpo_no_std", [1.2, -0.8, -0.8, 1.2, -0.8]),
    ],
)
def test_advantages_by_hand(kind, expected):
    got = numerics.group_advantages([[1.0, -1.0, -1.0, 1.0, -1.0]], kind)
    assert got[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["reinforce_rej", "rloo", "grpo", "grpo_no_std"])
@quick
@given(reward=st.floats(-1e6, 1e6), n=st.integers(1, 7))
def test_groups_of_equal_rewards_give_exactly_zero(kind, reward, n):
    assert numerics.group_advantages([[reward] * n], kind) == [[0.0] * n]


def test_all_wrong_groups_teach_nothing_under_raft_unless_the_best_is_always_kept():
    assert numerics.group_advantages([[-1.0, -1.0], [0.0, 0.0]], "raft") == [[0.0, 0.0], [0.0, 0.0]]
    assert numerics.group_advantages([[-3.0, -1.0]], "raft", accept_above=None) == [[0.0, 1.0]]
    assert numerics.group_advantages([[0.4, 0.9, 0.7]], "accepted", accept_above=0.5) == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize("kind", ["reinforce", "reinforce_rej", "raft", "accepted", "rloo", "grpo", "grpo_no_std"])
def test_an_error_verdict_leaves_its_groups_statistics(kind):
    rewards, valid = [[1.0, math.nan, 0.0, 0.0], [math.nan], [1.0, 0.0, 1.0]], [[True, False, True, True], [False]]
    got = numerics.group_advantages(rewards, kind, is_valid_P_G=[*valid, [True, False, True]])
    alone = numerics.group_advantages([[1.0, 0.0, 0.0], [1.0, 1.0]], kind)
    assert [got[0][0], *got[0][2:]] == alone[0] and [got[2][0], got[2][2]] == alone[1]
    assert got[0][1] == got[1][0] == got[2][1] == 0.0


@quick
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0.1, 10), st.floats(-5, 5))
def test_grpo_ignores_shift_and_scale_and_is_standardised(rewards, scale, shift):
    if max(rewards) - min(rewards) < 1e-3:
        return
    got = numerics.group_advantages([rewards], "grpo")[0]
    moved = numerics.group_advantages([[scale * r + shift for r in rewards]], "grpo")[0]
    assert moved == pytest.approx(got, abs=1e-8)
    assert sum(got) == pytest.approx(0, abs=1e-9) and sum(a * a for a in got) == pytest.approx(len(got), rel=1e-9)


def test_grpo_with_the_sample_standard_deviation_and_epsilon():
    got = numerics.group_advantages([[1.0, 0.0]], "grpo", ddof=1, eps=0.1)[0]
    assert got == pytest.approx([0.5 / (math.sqrt(0.5) + 0.1), -0.5 / (math.sqrt(0.5) + 0.1)])


def test_advantage_errors_name_what_was_given():
    with pytest.raises(ConfigError, match="got 'ppo'"):
        numerics.group_advantages([[1.0]], "ppo")
    with pytest.raises(DataError, match=r"groups of \[2\] rewards and \[1\] flags"):
        numerics.group_advantages([[1.0, 2.0]], "grpo", is_valid_P_G=[[True]])
    with pytest.raises(DataError, match="group 1 has"):
        numerics.group_advantages([[1.0], [math.nan]], "grpo")


@quick
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(0, 1))
def test_future_sums_by_definition(values, discount):
    n = len(values)
    plain = [math.fsum(discount ** (j - i) * values[j] for j in range(i + 1, n)) for i in range(n)]
    weights = [math.fsum(discount ** (j - i) for j in range(i + 1, n)) for i in range(n)]
    assert numerics.future_sums(values, discount=discount) == pytest.approx(plain, abs=1e-12)
    averaged = [p / w if w > 0 else 0.0 for p, w in zip(plain, weights, strict=True)]
    if discount > 1e-3:
        assert numerics.future_sums(values, discount=discount, average=True) == pytest.approx(averaged, abs=1e-9)


# -- token losses ----------------------------------------------------------------------------


def test_clipped_ratio_starts_as_reinforce():
    s, advantages = randn(7).sub(2).requires_grad_(), randn(7, seed=1)
    (a,) = torch.autograd.grad(clipped_ratio_loss(s, s.detach(), advantages).sum(), s)
    (b,) = torch.autograd.grad(reinforce_loss(s, advantages).sum(), s)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside
        (1.5, 2.0, -2.56, 0.0),  # rose past 1 + 0.28: clipped
        (0.5, 2.0, -1.0, -1.0),  # fell, but good: the unclipped term is the smaller
        (1.5, -2.0, 3.0, 3.0),  # rose, but bad: pushed back in full
        (0.5, -2.0, 1.6, 0.0),  # fell past 1 - 0.2: clipped
        (9.0, -2.0, 6.0, 0.0),  # dual clip at 3
        (1e30, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_ratio_case_by_case(ratio, advantage, loss, gradient):
    s = f64([math.log(ratio)]).requires_grad_()
    got = clipped_ratio_loss(s, f64([0.0]), f64([advantage]), clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    got.sum().backward()
    assert got.item() == pytest.approx(loss) and s.grad.item() == pytest.approx(gradient)


def test_an_overflowing_ratio_without_advantage_is_not_nan():
    s = torch.tensor([500.0], requires_grad=True)
    loss = clipped_ratio_loss(s, torch.zeros(1), torch.zeros(1))
    loss.sum().backward()
    assert loss.item() == 0.0 and s.grad.item() == 0.0


def test_clipped_likelihood_is_min_of_ratio_and_its_clip():
    s = f64([0.5, 1.0, 1.1, 1.5]).log().requires_grad_()
    loss = clipped_likelihood_loss(s, torch.zeros(4, dtype=torch.float64), clip_high=0.2)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), f64([-0.5, -1.0, -1.1, -1.2]))
    torch.testing.assert_close(s.grad, f64([-0.5, -1.0, -1.1, 0.0]))


def test_sampler_weight_is_truncated_and_constant():
    old = f64([-1.0, -1.0, -1.0, 400.0]).requires_grad_()
    got = sampler_weight(old, f64([-1.0, -0.5, -5.0, -400.0]), cap=2.0)
    torch.testing.assert_close(got, f64([1.0, math.exp(-0.5), 2.0, 2.0]))
    assert not got.requires_grad


def test_sampled_reverse_kl_cuts_the_ratio():
    s = f64([0.0, -1.0]).requires_grad_()
    loss = sampled_reverse_kl(s, f64([-1.0, -2.0]), behaviour_logprobs_N=f64([-3.0, -1.0]), max_ratio=4.0)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), f64([4.0, 1.0]))
    torch.testing.assert_close(s.grad, f64([0.0, 1.0]))


def test_kl_estimates_have_the_divergence_as_expectation_and_no_gradient():
    one = OnePosition()
    s = one.logits.log_softmax(-1)
    estimates = kl_estimates(s, one.teacher)
    exact = numerics.reverse_kl(one.logits, one.teacher_logits).item()
    for name in ("k1", "k3"):
        assert (s.detach().exp() @ estimates[name]).item() == pytest.approx(exact, rel=1e-10)
    assert (estimates["k3"] >= 0).all() and not any(e.requires_grad for e in estimates.values())
    torch.testing.assert_close(estimates["k2"], (s.detach() - one.teacher) ** 2 / 2)


def test_bfloat16_logprobs_are_upcast():
    s, t = randn(50).sub(2).bfloat16(), randn(50, seed=1).sub(2).bfloat16()
    for f in (reinforce_loss, sampled_reverse_kl, lambda a, b: clipped_ratio_loss(a, b, b)):
        got = f(s, t)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), f(s.double(), t.double()), rtol=1e-5, atol=1e-6)


def test_constants_get_no_gradient():
    s, *others = (randn(4, seed=i).requires_grad_() for i in range(4))
    loss = reinforce_loss(s, others[0]) + clipped_ratio_loss(s, others[1], others[0])
    loss = loss + sampled_reverse_kl(s, others[1], behaviour_logprobs_N=others[2], future_N=others[0])
    loss.sum().backward()
    assert s.grad is not None and all(x.grad is None for x in others)


def test_setting_and_shape_errors_name_what_was_given():
    x = torch.zeros(2)
    with pytest.raises(ConfigError) as e:
        clipped_ratio_loss(x, x, x, clip_low=1.5, clip_high=-1.0, dual_clip=0.5)
    assert [p.split(", got ")[1][:3] for p in e.value.problems] == ["1.5", "-1.", "0.5"]
    with pytest.raises(ConfigError, match=r"cap must be at least 1, got 0\.5"):
        sampler_weight(x, x, cap=0.5)
    with pytest.raises(ConfigError, match=r"max_ratio must be at least 1, got 0\.1"):
        sampled_reverse_kl(x, x, max_ratio=0.1)
    with pytest.raises(DataError, match=r"\[\(2,\), \(3,\)\]"):
        numerics.reinforce_loss(x, torch.zeros(3))
