"""Retention on other task sets, and held-out demonstrations under two models."""

import json

import numpy as np
import pytest

from tutelage.errors import DataError
from tutelage.evals import EvalResult, TaskCounts
from tutelage.evals.forgetting import nll_change, retention
from tutelage.monitors.entropy import entropy_stats
from tutelage.types import Span, Trajectory


def result(rate, *, num=80, n=16, seed=0, prefix="t"):
    counts = np.random.default_rng(seed).binomial(n, rate, num).tolist()
    return EvalResult(
        counts=tuple(TaskCounts(task_id=f"{prefix}{i}", name="x", n=n, c=c) for i, c in enumerate(counts)),
        ks=(1,),
        seed=0,
        sampling={},
        entropy=entropy_stats([]),
        mean_tokens=1.0,
        truncated_share=0.0,
        num_samples=num * n,
        num_tokens=num * n,
    )


def test_a_lost_ability_is_named_and_a_kept_one_is_not():
    kept = retention(
        {"code": result(0.5), "chat": result(0.5)}, {"code": result(0.3, seed=1), "chat": result(0.5, seed=2)}
    )
    assert kept.lost == ("code",)
    assert kept.sets["code"].gain.value == pytest.approx(-0.2, abs=0.03)
    assert [row[0] for row in kept.rows()] == ["code", "chat"]
    assert json.loads(json.dumps(kept.to_json()))["lost"] == ["code"]


def test_retention_refuses_other_sets_or_tasks():
    with pytest.raises(DataError, match=r"\['code'\] and \['chat'\]"):
        retention({"code": result(0.5)}, {"chat": result(0.5)})
    with pytest.raises(DataError, match="80 are only before"):
        retention({"code": result(0.5)}, {"code": result(0.5, prefix="other")})


def demonstration(i):
    prompt = Span(token_ids=(1,), role="user", author="user")
    answer = Span(token_ids=(2, 3), role="assistant", author="human", is_sampled=True, is_trainable=True)
    return Trajectory(id=f"d{i}", task_id=f"t{i}", task_hash="h", spans=(prompt, answer))


class Fixed:
    def __init__(self, shift):
        self.shift = shift

    def score(self, trajectories):
        return [[-1.0 - 0.1 * i + self.shift, -2.0 + self.shift] for i, _ in enumerate(trajectories)]


def test_nll_change_is_after_minus_before_per_token():
    demos = [demonstration(i) for i in range(20)]
    change = nll_change(demos, Fixed(0.0), Fixed(0.25))
    assert change.value == pytest.approx(-0.25)
    assert change.half_width < 1e-9  # the same for each demonstration: pairing removes their spread
