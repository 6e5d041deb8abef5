import itertools
import math
import subprocess
import sys

import pytest

from tutelage import numerics
from tutelage.errors import ConfigError


@pytest.mark.parametrize(
    ("k", "sigmas"), [(1, 0.0), (2, 0.57), (4, 1.03), (8, 1.42), (16, 1.77), (32, 2.07), (64, 2.35)]
)
def test_expected_max_of_normals(k, sigmas):
    assert numerics.expected_max_of_normals(k) == pytest.approx(sigmas, abs=7e-3)


def test_expected_max_of_two_and_three_normals_in_closed_form():
    assert numerics.expected_max_of_normals(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-10)
    assert numerics.expected_max_of_normals(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-10)


@pytest.mark.parametrize(("k", "nats"), [(2, 0.19), (4, 0.64), (8, 1.20), (16, 1.84), (32, 2.50), (64, 3.18)])
def test_best_of_k_bound_values(k, nats):
    assert numerics.best_of_k_kl_bound(k) == pytest.approx(nats, abs=6e-3)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_best_of_k_by_enumeration_stays_under_the_bound_and_nears_it_with_many_outcomes(k):
    def best_of_k_kl(p):
        below = list(itertools.accumulate(p, initial=0.0))
        best = [b**k - a**k for a, b in itertools.pairwise(below)]
        return math.fsum(x * math.log(x / q) for x, q in zip(best, p, strict=True) if x > 0)

    bound = numerics.best_of_k_kl_bound(k)
    assert best_of_k_kl([0.5, 0.3, 0.2]) < bound
    assert best_of_k_kl([1e-4] * 10_000) == pytest.approx(bound, rel=1e-3)


def test_kl_of_the_accepted_by_enumeration():
    p, accepted = [0.1, 0.2, 0.3, 0.4], [0, 2]
    total = sum(p[i] for i in accepted)
    exact = math.fsum(p[i] / total * math.log(p[i] / total / p[i]) for i in accepted)
    assert numerics.accepted_kl(total) == pytest.approx(exact, rel=1e-12)
    assert numerics.accepted_kl(1.0) == 0.0


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_all_same_probability_by_enumeration(n, p):
    exact = math.fsum(
        math.prod(p if hit else 1 - p for hit in tries)
        for tries in itertools.product([True, False], repeat=n)
        if len(set(tries)) == 1
    )
    assert numerics.all_same_probability(p, n) == pytest.approx(exact, abs=1e-12)
    assert numerics.mixed_probability(p, n) == pytest.approx(1 - exact, abs=1e-12)


def test_impossible_inputs_are_refused():
    for call, message in (
        (lambda: numerics.accepted_kl(0.0), "got 0.0"),
        (lambda: numerics.best_of_k_kl_bound(0), "k must be at least 1, got 0"),
        (lambda: numerics.all_same_probability(1.2, 3), "got 1.2"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_public_names_all_resolve_and_are_listed_once():
    from tutelage.numerics import _MODULES

    listed = sorted(name for names in _MODULES.values() for name in names)
    assert listed == sorted(numerics.__all__) == dir(numerics)
    assert all(getattr(numerics, name) is not None for name in listed)
    with pytest.raises(AttributeError, match="no attribute 'kl'"):
        numerics.kl  # noqa: B018


def test_the_parts_without_tensors_load_without_torch():
    code = "import sys, tutelage.numerics as n; n.group_advantages([[1.0]], 'grpo'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
