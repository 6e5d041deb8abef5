"""The tightrope: costs against enumeration, and what each learner was trained on."""

import itertools

import numpy as np
import pytest

from tutelage.claims.base import HOLDS
from tutelage.claims.compounding import (
    CLAIM,
    OFF,
    OFF_ERRORS,
    ON,
    Size,
    episode,
    error,
    expected_cost,
    imitate,
    measure,
    untrained,
)

SMALL = Size(horizons=(4, 8), eps=0.02, rounds=2, tolerance=0.2)


@pytest.mark.parametrize("off_error", OFF_ERRORS.values())
def test_the_untrained_state_errs_as_often_as_it_says(off_error):
    assert error(untrained(off_error, 3), OFF) == pytest.approx(off_error, abs=1e-9)


@pytest.mark.parametrize(("on", "off"), [(0.1, 1.0), (0.3, 0.6), (0.2, 0.2)])
def test_expected_cost_is_the_sum_over_all_episodes(on, off):
    horizon, total = 5, 0.0
    for wrong in itertools.product((False, True), repeat=horizon):
        p, state = 1.0, ON
        for is_wrong in wrong:
            q = on if state == ON else off
            p *= q if is_wrong else 1 - q
            state = OFF if is_wrong else ON
        total += p * sum(wrong)
    assert expected_cost(on, off, horizon) == pytest.approx(total, rel=1e-12)


def test_the_experts_states_are_all_on_the_rope_and_the_learners_are_not():
    rng = np.random.default_rng(0)
    assert set(episode(None, 50, rng)) == {ON}
    assert OFF in episode(untrained(1.0, 0), 50, rng)


def test_cloning_learns_its_own_states_only_and_dagger_both():
    cloned = imitate(untrained(1.0, 0), is_on_policy=False, horizon=8, seed=0, size=SMALL)
    dagger = imitate(untrained(1.0, 0), is_on_policy=True, horizon=8, seed=0, size=SMALL)
    assert error(cloned, ON) == pytest.approx(SMALL.eps, rel=0.3)
    assert error(cloned, OFF) == pytest.approx(1.0, abs=1e-9)
    assert error(dagger, ON) < 2 * SMALL.eps and error(dagger, OFF) < 4 * SMALL.eps


def test_small_experiment_points_the_right_way():
    numbers = measure(0, SMALL)
    assert numbers["slope_cloning_q1"] > numbers["slope_cloning_q03"] > 0.9
    assert numbers["slope_cloning_q1"] > 1.5 and numbers["unseen_state_moved"] == 0


@pytest.mark.slow
def test_the_claim_at_full_size():
    found = CLAIM.judge([CLAIM.measure(seed) for seed in CLAIM.seeds])
    assert found.verdict == HOLDS, found.statements
