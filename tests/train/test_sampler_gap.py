"""The gap between sampler and trainer is taken wherever the current weights sampled, and else the run says why not."""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_saved_state import TASK, Table, closed, session, stage

from tutelage.errors import NumericsError
from tutelage.policies.table import TablePolicy
from tutelage.train.session import _Comparable
from tutelage.types import Draw, Group, SamplingParams, Span, Trajectory

__all__ = ["closed"]
VERSION = "stage0-step0"
SAMPLED, GREEDY = SamplingParams(), SamplingParams(temperature=0.0)


def sampled(
    i: int, *, error: float = 0.0, version: str = VERSION, params: SamplingParams = SAMPLED, **more: Any
) -> Trajectory:
    """Three tokens of the session's policy as it starts, with log-probabilities that are off by `error`."""
    logprobs_DV = TablePolicy(5).table_VD.detach().T.log_softmax(-1)
    tokens = np.random.default_rng(i).integers(0, 5, 4).tolist()
    known = tuple(float(logprobs_DV[a, b]) + error for a, b in itertools.pairwise(tokens))
    spans = (
        Span(token_ids=(tokens[0],), role="user", author="user"),
        Span(
            token_ids=tuple(tokens[1:]),
            role="assistant",
            author="student",
            is_sampled=True,
            is_trainable=True,
            policy_version=version,
            sampling=params,
            **{"logprobs": known, **more},
        ),
    )
    return Trajectory(id=f"t{i}", task_id="t", task_hash=TASK.hash, spans=spans)


def drawn(root: Path, make: Callable[[int], Trajectory], count: int = 6, **more: Any) -> dict[str, Any]:
    """The event that one draw of so many leaves."""
    draw = Draw(groups=(Group(task=TASK, trajectories=tuple(make(i) for i in range(count))),), author="student")

    class Given:
        def state(self) -> dict[str, Any]:
            return {}

        def draw(self, ctx: Any) -> Draw:
            return replace(draw, **more)

    session(root).draw(replace(stage(), source=Given()))  # type: ignore[arg-type]
    events = [json.loads(x) for x in (root / "events.jsonl").read_text().splitlines()]
    (found,) = [e for e in events if e["event"] == "sampler_gap"]
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_on_policy", [True, False])
@pytest.mark.parametrize("params", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_whatever_the_current_weights_sampled_is_compared(
    tmp_path: Path, is_on_policy: bool, params: SamplingParams
) -> None:
    event = drawn(tmp_path, lambda i: sampled(i, error=0.25, params=params), is_on_policy=is_on_policy)
    assert event["mean_abs_logprob_gap_nats"] == pytest.approx(0.25, rel=1e-6)
    assert (event["num_tokens"], event["num_trajectories"]) == (18, 6)
    with pytest.raises(NumericsError, match=r"sampler and trainer must agree.* 0\.75 nats on average over 18 tokens"):
        drawn(tmp_path / "wrong", lambda i: sampled(i, error=0.75, params=params), is_on_policy=is_on_policy)


def test_of_a_mixture_what_is_fresh_is_compared(tmp_path: Path) -> None:
    """Replayed ones are of earlier weights, a mixture's others of another model."""

    def make(i: int) -> Trajectory:
        if i < 2:
            return sampled(i, error=9.0).marked("replayed", weight=1.0)
        return sampled(i, error=0.1) if i < 4 else sampled(i, error=9.0, version="teacher")

    event = drawn(tmp_path, make, author="mixed")
    assert event["mean_abs_logprob_gap_nats"] == pytest.approx(0.1, rel=1e-6) and event["num_trajectories"] == 2


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"version": "base"}, "not sampled by the weights that are trained"),
        ({"logprobs": None}, "no log-probabilities"),
        ({"is_context_exact": False}, "no log-probabilities"),
    ],
)
def test_where_nothing_can_be_compared_the_run_says_why(tmp_path: Path, more: dict[str, Any], why: str) -> None:
    event = drawn(tmp_path, lambda i: sampled(i, **more))
    ((reason, count),) = event["skipped"].items()
    assert reason.startswith(why) and count == 6


@pytest.mark.parametrize("count", [5, 32, 33, 64, 65, 200, 1000])
def test_the_pick_is_even_over_the_draw(count: int) -> None:
    compared = _Comparable(VERSION)
    for i in range(count):
        compared.add(replace(sampled(0), id=str(i)))
    ids = [int(t.id) for t in compared.picked()]
    assert len(ids) == min(count, 32) and ids == sorted(set(ids)) and ids[0] == 0
    assert ids[-1] >= count - 1 - count // 16
    assert max(np.diff(ids)) <= 2 * count / len(ids) + 1


def test_tokens_just_outside_the_trainers_top_p_are_counted_apart(tmp_path: Path) -> None:
    """A token at the edge of the nucleus may be in the sampler's and not in the trainer's."""
    likely = int(TablePolicy(5).table_VD[:, 0].argmax())
    unlikely = int(TablePolicy(5).table_VD[:, 0].argmin())

    def make(i: int) -> Trajectory:
        t = sampled(0, params=SamplingParams(top_p=0.2))
        token = unlikely if i == 0 else likely
        span = replace(t.spans[1], token_ids=(token,), logprobs=(0.0,))
        return replace(t, id=f"t{i}", spans=(replace(t.spans[0], token_ids=(0,)), span))

    event = drawn(tmp_path, make, count=20)
    assert event["frac_outside_top_p"] == pytest.approx(0.05) and event["mean_abs_logprob_gap_nats"] < 1e-6
    with pytest.raises(NumericsError, match="20% of the tokens are outside"):
        drawn(tmp_path / "many", make, count=5)


def test_the_policy_here_is_the_sessions() -> None:
    assert bool((Table(5).table_VD == TablePolicy(5).table_VD).all())
