import math

import numerics_oracles as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_oracles import INF, quick

from tutelage import numerics
from tutelage.errors import ConfigError
from tutelage.testing import shapes_match_names

target_logprobs = shapes_match_names(numerics.target_logprobs)
entropy = shapes_match_names(numerics.entropy)
shape_logits = shapes_match_names(numerics.shape_logits)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@quick
@given(oracle.rows(6), st.integers(0, 5))
def test_target_logprobs_match_the_oracle(row, target):
    got = target_logprobs(f64([[row]]), torch.tensor([[target]])).item()
    assert got == pytest.approx(oracle.log_probabilities(row)[target], rel=1e-10, abs=1e-12)


@quick
@given(oracle.rows(6))
def test_entropy_matches_the_oracle(row):
    assert entropy(f64([[row]])).item() == pytest.approx(oracle.entropy(row), rel=1e-10, abs=1e-12)


def test_entropy_of_uniform_and_of_certain():
    assert entropy(torch.zeros(1, 1, 7, dtype=torch.float64)).item() == pytest.approx(math.log(7), rel=1e-12)
    certain = f64([[[0.0, -INF, -INF]]]).requires_grad_()
    value = entropy(certain)
    value.sum().backward()
    assert value.item() == 0.0 and torch.isfinite(certain.grad).all()


@pytest.mark.parametrize(
    "function", [lambda x: entropy(x), lambda x: target_logprobs(x, torch.tensor([[2, 0], [1, 1]]))]
)
def test_gradients_against_finite_differences(function):
    x = torch.randn(2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))


def test_bfloat16_logits_are_upcast_before_the_softmax():
    x = torch.randn(3, 4, 300, generator=torch.Generator().manual_seed(0)).mul(3).bfloat16()
    ids = torch.randint(0, 300, (3, 4), generator=torch.Generator().manual_seed(1))
    assert target_logprobs(x, ids).dtype == entropy(x).dtype == shape_logits(x, temperature=0.7).dtype == torch.float32
    torch.testing.assert_close(target_logprobs(x, ids).double(), target_logprobs(x.double(), ids), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy(x).double(), entropy(x.double()), rtol=1e-5, atol=1e-6)


# -- shaping --------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(-6, 6), min_size=8, max_size=8), st.floats(0.3, 3), st.floats(0.05, 0.999))
def test_nucleus_is_the_smallest_set_reaching_top_p(row, temperature, top_p):
    """Whole-number logits tie often, which is where a threshold alone keeps too many."""
    shaped = shape_logits(f64([[row]]), temperature=temperature, top_p=top_p)[0, 0]
    assert {v for v in range(8) if shaped[v] > -INF} == oracle.nucleus(row, temperature, top_p)


def test_nucleus_keeps_the_crossing_token_and_drops_the_next():
    logits = f64([[[math.log(0.5), math.log(0.3), math.log(0.2)]]])
    assert (shape_logits(logits, top_p=0.6) > -INF).tolist() == [[[True, True, False]]]
    assert (shape_logits(logits, top_p=0.49) > -INF).tolist() == [[[True, False, False]]]


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_nucleus_over_a_large_vocabulary_is_found_whatever_its_width(scale):
    """From flat (the nucleus is most of the vocabulary) to peaked (a few tokens), against a plain sort."""
    logits = torch.randn(3, 2, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    kept = shape_logits(logits, top_p=0.9) > -INF
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    expected = torch.zeros_like(kept).scatter(-1, order, probs.cumsum(-1) - probs < 0.9)
    assert torch.equal(kept, expected)
    assert kept.sum(-1).double().std() > 0 or scale < 0.1


def test_shaping_a_row_does_not_depend_on_the_other_rows():
    logits = (
        torch.randn(4, 3, 500, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.01, 1, 3, 9])[:, None, None]
    )
    whole = shape_logits(logits, temperature=0.8, top_p=0.8)
    for b in range(4):
        for t in range(3):
            alone = shape_logits(logits[b : b + 1, t : t + 1], temperature=0.8, top_p=0.8)
            assert torch.equal(whole[b, t], alone[0, 0])


def test_temperature_zero_is_the_most_likely_token_with_probability_one():
    logits = f64([[[1.0, 3.0, 3.0, -INF]]])
    shaped = shape_logits(logits, temperature=0)
    assert shaped.log_softmax(-1).tolist() == [[[-INF, 0.0, -INF, -INF]]]


def test_shaping_with_nothing_to_do_changes_nothing():
    logits = torch.randn(2, 3, 5)
    assert shape_logits(logits).data_ptr() == logits.data_ptr()


def test_gradient_through_shaping_is_that_of_the_cut_distribution():
    logits = f64([[[2.0, 1.0, 0.0, -1.0]]]).requires_grad_()
    shaped = shape_logits(logits, temperature=0.5, top_p=0.95)
    kept = [0, 1]
    target_logprobs(shaped, torch.tensor([[1]])).sum().backward()
    p = oracle.probabilities([4.0, 2.0])
    assert (shaped > -INF)[0, 0].nonzero().flatten().tolist() == kept
    torch.testing.assert_close(logits.grad[0, 0], f64([-2 * p[0], 2 * (1 - p[1]), 0.0, 0.0]))


@pytest.mark.parametrize(("settings", "message"), [({"temperature": -1.0}, "got -1.0"), ({"top_p": 0.0}, "got 0.0")])
def test_wrong_shaping_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        shape_logits(torch.zeros(1, 1, 2), **settings)
