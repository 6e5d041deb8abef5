import itertools
import math
from functools import partial

import numerics_oracles as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_oracles import INF, quick

from tutelage import numerics
from tutelage.errors import ConfigError, DataError
from tutelage.testing import shapes_match_names

forward_kl = shapes_match_names(numerics.forward_kl)
reverse_kl = shapes_match_names(numerics.reverse_kl)
jsd = shapes_match_names(numerics.jsd)
skew_kl = shapes_match_names(numerics.skew_kl)
skew_reverse_kl = shapes_match_names(numerics.skew_reverse_kl)
top_k_kl = shapes_match_names(numerics.top_k_kl)
hinton_loss = shapes_match_names(numerics.hinton_loss)

FORMS = {
    "forward_kl": (forward_kl, oracle.forward_kl),
    "reverse_kl": (reverse_kl, oracle.reverse_kl),
    "jsd .5": (partial(jsd, beta=0.5), partial(oracle.jsd, beta=0.5)),
    "jsd .1": (partial(jsd, beta=0.1), partial(oracle.jsd, beta=0.1)),
    "jsd .8 normalised": (
        partial(jsd, beta=0.8, normalised=True),
        lambda s, t: oracle.jsd(s, t, 0.8) / (0.8 * (1 - 0.8)),
    ),
    "jsd 0 normalised": (partial(jsd, beta=0.0, normalised=True), oracle.forward_kl),
    "jsd 1 normalised": (partial(jsd, beta=1.0, normalised=True), oracle.reverse_kl),
    "jsd .01 normalised": (
        partial(jsd, beta=0.01, normalised=True),
        lambda s, t: oracle.jsd(s, t, 0.01) / (0.01 * (1 - 0.01)),
    ),
    "jsd .98": (partial(jsd, beta=0.98), partial(oracle.jsd, beta=0.98)),
    "skew_kl .97": (partial(skew_kl, alpha=0.97), partial(oracle.skew_kl, alpha=0.97)),
    "skew_reverse_kl .97": (partial(skew_reverse_kl, alpha=0.97), partial(oracle.skew_reverse_kl, alpha=0.97)),
    "skew_kl": (partial(skew_kl, alpha=0.1), partial(oracle.skew_kl, alpha=0.1)),
    "skew_reverse_kl": (partial(skew_reverse_kl, alpha=0.3), partial(oracle.skew_reverse_kl, alpha=0.3)),
    "skew_kl 0": (partial(skew_kl, alpha=0.0), oracle.forward_kl),
    "skew_reverse_kl 0": (partial(skew_reverse_kl, alpha=0.0), oracle.reverse_kl),
}
every_form = pytest.mark.parametrize("name", FORMS)
BOUNDED = [name for name in FORMS if name not in ("reverse_kl", "jsd 1 normalised", "skew_reverse_kl 0")]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def value_and_gradient(function, student, teacher):
    student = student.clone().requires_grad_()
    value = function(student, teacher)
    value.sum().backward()
    return value.detach(), student.grad


@every_form
@quick
@given(pairs=st.lists(st.tuples(oracle.rows(), oracle.rows()), min_size=1, max_size=3))
def test_divergence_matches_the_oracle_in_float64(name, pairs):
    function, expected = FORMS[name]
    got = function(f64([[s for s, _ in pairs]]), f64([[t for _, t in pairs]]))
    torch.testing.assert_close(got[0], f64([expected(s, t) for s, t in pairs]), rtol=1e-9, atol=1e-11)


@every_form
@quick
@given(row=oracle.rows(), shift=st.floats(-50, 50))
def test_equal_distributions_give_zero_value_and_zero_gradient(name, row, shift):
    x = f64([[row]])
    value, gradient = value_and_gradient(FORMS[name][0], x + shift, x)
    assert abs(value.item()) < 1e-12 and gradient.abs().max() < 1e-12


@every_form
def test_gradient_against_finite_differences(name):
    teacher = randn(2, 3, 5, seed=1) * 2
    assert torch.autograd.gradcheck(
        lambda x: FORMS[name][0](x, teacher), (randn(2, 3, 5).mul(2).requires_grad_(),), rtol=1e-4, atol=1e-7
    )


@every_form
def test_no_gradient_reaches_the_teacher(name):
    student, teacher = randn(1, 2, 4).requires_grad_(), randn(1, 2, 4, seed=1).requires_grad_()
    FORMS[name][0](student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@every_form
def test_bfloat16_is_as_good_as_rounding_the_inputs_allows(name):
    student, teacher = (randn(4, 8, 300, seed=s).mul(3).bfloat16() for s in (0, 1))
    value, gradient = value_and_gradient(FORMS[name][0], student, teacher)
    exact, exact_gradient = value_and_gradient(FORMS[name][0], student.double(), teacher.double())
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-8, atol=1e-7)


SHARES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.049, 0.051, 0.1, 0.5, 0.9, 0.949, 0.951, 0.99, 0.999, 0.9999, 0.99999)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "form", [partial(jsd, normalised=True), skew_kl, skew_reverse_kl], ids=["jsd", "skew_kl", "skew_reverse_kl"]
)
def test_float32_keeps_its_digits_at_every_share(form, share):
    student = randn(4, 8, 300, seed=0, dtype=torch.float32) * 3
    teacher = student + randn(4, 8, 300, seed=1, dtype=torch.float32)
    function = lambda s, t: form(s, t, share)  # noqa: E731
    value, gradient = value_and_gradient(function, student, teacher)
    exact, exact_gradient = value_and_gradient(function, student.double(), teacher.double())
    assert ((value - exact).abs().max() / exact.mean()).item() < 2e-4
    assert ((gradient - exact_gradient).norm() / exact_gradient.norm()).item() < 2e-4


HARD_TEACHERS = {
    "one-hot": ([0.3, -1.0, 2.0, 0.5], [-INF, 0.0, -INF, -INF]),
    "some -inf": ([0.3, -1.0, 2.0, 0.5], [1.0, 0.0, -INF, 0.2]),
    "both -inf": ([0.3, -INF, 2.0, 0.5], [1.0, -INF, 0.5, 0.2]),
    "one-hot and equal": ([-INF, 3.0, -INF, -INF], [-INF, 0.0, -INF, -INF]),
    "confident": ([60.0, 0.0, 0.0, 0.0], [0.0, 60.0, 0.0, 0.0]),
    "certain": ([300.0, 0.0, 0.0, 0.0], [300.0, 0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HARD_TEACHERS)
@every_form
def test_infinite_and_one_hot_logits_give_the_true_value_and_a_finite_gradient(name, case, dtype):
    function, expected = FORMS[name]
    student, teacher = HARD_TEACHERS[case]
    value, gradient = value_and_gradient(function, f64([[student]]).to(dtype), f64([[teacher]]).to(dtype))
    true = expected(student, teacher) if dtype == torch.float64 else None
    if true is not None and not (true == INF and value.item() > 100):  # exp underflows in the oracle
        assert value.item() == pytest.approx(true, rel=1e-9, abs=1e-12)
    assert torch.isfinite(gradient).all() and not value.isnan().any()
    if name in BOUNDED:
        assert torch.isfinite(value).all()


def test_reverse_kl_is_infinite_where_the_student_has_mass_the_teacher_rules_out():
    value, gradient = value_and_gradient(reverse_kl, f64([[[0.0, 0.0]]]), f64([[[0.0, -INF]]]))
    assert value.item() == INF and torch.equal(gradient, torch.zeros(1, 1, 2, dtype=torch.float64))


def test_forward_kl_is_infinite_where_the_student_rules_out_teacher_mass():
    value, gradient = value_and_gradient(forward_kl, f64([[[0.0, -INF]]]), f64([[[0.0, 0.0]]]))
    assert value.item() == INF
    torch.testing.assert_close(gradient, f64([[[0.5, -0.5]]]))


@every_form
def test_a_vocabulary_of_one_is_zero(name):
    value, gradient = value_and_gradient(FORMS[name][0], randn(2, 1, 1), randn(2, 1, 1, seed=1))
    assert value.abs().max() == 0 and gradient.abs().max() == 0


@every_form
def test_any_leading_axes_give_the_same_numbers(name):
    student, teacher = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    function = FORMS[name][0]
    bare = {forward_kl: numerics.forward_kl, reverse_kl: numerics.reverse_kl}.get(function, function)
    if isinstance(function, partial):
        bare = partial(function.func.__wrapped__, **function.keywords)
    torch.testing.assert_close(bare(student.reshape(6, 5), teacher.reshape(6, 5)), function(student, teacher).flatten())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
def test_shape_error_names_both_shapes_and_the_cure(name):
    with pytest.raises(DataError, match=rf"{name} .*student \(1, 2, 5\), teacher \(1, 2, 8\).*slice both"):
        getattr(numerics, name)(torch.zeros(1, 2, 5), torch.zeros(1, 2, 8))


@pytest.mark.parametrize("function", [jsd, skew_kl, skew_reverse_kl])
@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_outside_zero_to_one_is_refused(function, share):
    with pytest.raises(ConfigError, match=f"got {share}"):
        function(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), share)


# -- what each one is ------------------------------------------------------------------------


def test_forward_kl_gradient_is_student_minus_teacher_probability():
    student, teacher = randn(2, 3, 6), randn(2, 3, 6, seed=1)
    _, gradient = value_and_gradient(forward_kl, student, teacher)
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1), rtol=1e-9, atol=1e-12)


def test_forward_kl_to_a_one_hot_teacher_is_negative_log_likelihood():
    student = randn(1, 1, 4)
    teacher = f64([[[-INF, 0.0, -INF, -INF]]])
    torch.testing.assert_close(forward_kl(student, teacher), -student.log_softmax(-1)[..., 1])


def test_the_two_directions_exchange_the_arguments():
    student, teacher = randn(2, 3, 6), randn(2, 3, 6, seed=1)
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(jsd(student, teacher, 0.3), jsd(teacher, student, 0.7), rtol=1e-12, atol=1e-14)


def test_normalised_jsd_tends_to_the_two_kls_and_keeps_one_scale():
    student, teacher = f64([[[0.4, 0.4, 0.2]]]).log(), f64([[[0.7, 0.2, 0.1]]]).log()
    near = partial(jsd, student, teacher, normalised=True)
    torch.testing.assert_close(near(beta=1e-5), forward_kl(student, teacher), rtol=1e-4, atol=0)
    torch.testing.assert_close(near(beta=1 - 1e-5), reverse_kl(student, teacher), rtol=1e-4, atol=0)
    sizes = [near(beta=b / 20).item() for b in range(21)]
    assert min(sizes) == pytest.approx(0.184, abs=1e-3) and max(sizes) == pytest.approx(0.192, abs=1e-3)
    for beta in (0.0, 1.0):
        torch.testing.assert_close(jsd(student, teacher, beta), torch.zeros(1, 1, dtype=torch.float64))


def test_jsd_mixes_probabilities_not_log_probabilities():
    student, teacher = f64([[[5.0, -5.0]]]), f64([[[-5.0, 5.0]]])
    assert jsd(student, teacher, 0.5).item() == pytest.approx(math.log(2), abs=1e-3)


def test_skewed_forms_are_bounded_where_the_plain_ones_are_not():
    student, teacher = f64([[[200.0, 0.0]]]), f64([[[0.0, 200.0]]])
    assert forward_kl(student, teacher).item() == pytest.approx(200)
    assert skew_kl(student, teacher, 0.1).item() == pytest.approx(-math.log(0.1))
    assert skew_reverse_kl(student, teacher, 0.1).item() == pytest.approx(-math.log(0.1))


def test_hinton_loss_is_its_two_terms_and_keeps_the_gradient_scale_over_temperature():
    student, teacher, ids = randn(2, 3, 6), randn(2, 3, 6, seed=1), torch.randint(0, 6, (2, 3))
    for b, t in ((0, 0), (1, 2)):
        hard = -oracle.log_probabilities(student[b, t].tolist())[int(ids[b, t])]
        soft = oracle.forward_kl([x / 3 for x in student[b, t].tolist()], [x / 3 for x in teacher[b, t].tolist()])
        got = hinton_loss(student, teacher, ids, alpha=0.2, temperature=3.0)[b, t].item()
        assert got == pytest.approx(0.2 * hard + 0.8 * 9 * soft, rel=1e-10)
    sizes = []
    for temperature in (8.0, 16.0, 32.0):
        soft_only = partial(hinton_loss, target_ids_BT=ids, alpha=0.0, temperature=temperature)
        sizes.append(value_and_gradient(soft_only, student / 8, teacher / 8)[1].norm().item())
    assert max(sizes) / min(sizes) < 1.01
    with pytest.raises(ConfigError, match=r"temperature must be positive, got 0"):
        hinton_loss(student, teacher, ids, temperature=0)


def test_hinton_loss_of_the_targets_alone_is_finite_whatever_the_teacher():
    student, teacher = f64([[[0.3, -INF, 2.0]]]), f64([[[0.0, 0.0, 0.0]]])
    value, gradient = value_and_gradient(
        partial(hinton_loss, target_ids_BT=torch.tensor([[2]]), alpha=1.0), student, teacher
    )
    torch.testing.assert_close(value, -student.log_softmax(-1)[..., 2])
    assert torch.isfinite(gradient).all()


# -- top-k with a tail -----------------------------------------------------------------------


def top_k(teacher, k):
    logprobs, ids = teacher.log_softmax(-1).topk(k, dim=-1)
    return ids, logprobs


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@quick
@given(student=oracle.rows(6, 8), teacher=oracle.rows(6, 8), k=st.integers(1, 5))
def test_top_k_kl_matches_the_oracle(direction, student, teacher, k):
    ids, logprobs = top_k(f64([[teacher]]), k)
    got = top_k_kl(f64([[student]]), ids, logprobs, direction=direction, min_tail=0.0).item()
    expected = oracle.top_k_kl(student, ids[0, 0].tolist(), logprobs[0, 0].tolist(), direction)
    assert got == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_top_k_gradient_against_finite_differences(direction):
    ids, logprobs = top_k(randn(2, 3, 7, seed=1), 3)
    f = partial(top_k_kl, teacher_ids_BTK=ids, teacher_logprobs_BTK=logprobs, direction=direction)
    assert torch.autograd.gradcheck(f, (randn(2, 3, 7).requires_grad_(),))


@pytest.mark.parametrize(("direction", "whole"), [("forward", forward_kl), ("reverse", reverse_kl)])
def test_top_k_of_the_whole_vocabulary_is_the_divergence_and_fewer_is_a_lower_bound(direction, whole):
    student, teacher = randn(2, 3, 7), randn(2, 3, 7, seed=1)
    exact, exact_gradient = value_and_gradient(whole, student, teacher)
    values = []
    for k in range(1, 8):
        ids, logprobs = top_k(teacher, k)
        f = partial(top_k_kl, teacher_ids_BTK=ids, direction=direction, teacher_logprobs_BTK=logprobs, min_tail=0.0)
        value, gradient = value_and_gradient(lambda s, t, f=f: f(s), student, teacher)
        values.append(value)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient, exact_gradient)
    for lower, higher in itertools.pairwise(values):
        assert (lower <= higher + 1e-12).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_mass_outside_the_top_k_is_not_free(direction):
    teacher = f64([[[4.0, 3.0, -4.0, -4.0]]])
    ids, logprobs = top_k(teacher, 2)
    moved = f64([[[4.0, 3.0, 5.0, -4.0]]])
    _, gradient = value_and_gradient(lambda s, t: top_k_kl(s, ids, logprobs, direction=direction), moved, teacher)
    assert gradient[0, 0, 2] > 0.1


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_absent_top_k_entries_belong_to_the_tail_even_where_they_repeat_an_id(direction):
    student = randn(1, 1, 6).expand(1, 2, 6).clone()
    ids, logprobs = top_k(randn(1, 1, 6, seed=1), 2)
    padded_ids = torch.cat([ids, ids[..., :1]], -1)
    padded = torch.cat([logprobs, f64([[[-INF]]])], -1)
    one = value_and_gradient(lambda s, t: top_k_kl(s, ids, logprobs, direction=direction), student[:, :1], None)
    two = value_and_gradient(lambda s, t: top_k_kl(s, padded_ids, padded, direction=direction), student[:, 1:], None)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("excess", [0.0, 1e-4])
def test_stored_probabilities_that_add_up_to_one_or_more_stay_finite(direction, excess):
    ids = torch.tensor([[[0, 1]]])
    logprobs = f64([[[0.5 + excess, 0.5]]]).log()
    value, gradient = value_and_gradient(
        lambda s, t: top_k_kl(s, ids, logprobs, direction=direction), f64([[[1.0, 0.0, 0.5, 2.0]]]), None
    )
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def test_a_stored_tail_is_used_as_it_is():
    student, (ids, logprobs) = randn(1, 2, 6), top_k(randn(1, 2, 6, seed=1), 2)
    tail = (1 - logprobs.exp().sum(-1)).log()
    torch.testing.assert_close(
        top_k_kl(student, ids, logprobs, teacher_tail_logprobs_BT=tail), top_k_kl(student, ids, logprobs)
    )
    assert not torch.allclose(
        top_k_kl(student, ids, logprobs, teacher_tail_logprobs_BT=tail - 1), top_k_kl(student, ids, logprobs)
    )


def test_top_k_errors_name_what_was_given():
    with pytest.raises(DataError, match=r"ids \(1, 2, 3\), log-probabilities \(1, 2, 4\), student \(1, 2, 5\)"):
        numerics.top_k_kl(torch.zeros(1, 2, 5), torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(1, 2, 4))
    with pytest.raises(ConfigError, match="got 'both'"):
        numerics.top_k_kl(
            torch.zeros(1, 2, 5), torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(1, 2, 3), direction="both"
        )


def test_the_shape_check_sees_a_wrong_axis():
    with pytest.raises(DataError, match="V is 5 in student_logits_BTV but 6 in teacher_logits_BTV"):
        forward_kl(torch.zeros(1, 2, 5), torch.zeros(1, 2, 6))
    with pytest.raises(DataError, match="names 3 axes"):
        forward_kl(torch.zeros(2, 5), torch.zeros(2, 5))
