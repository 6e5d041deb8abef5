"""Trajectories and draws: what their counts and flags promise."""

import itertools
from dataclasses import replace

import pytest

from tutelage.errors import DataError
from tutelage.types import Draw, Group, SamplingParams, Span, Status, Task, Trajectory, Verdict, content_hash, seed_for


def span(n: int, trainable: bool) -> Span:
    return Span(token_ids=tuple(range(n)), role="assistant", author="a", is_sampled=trainable, is_trainable=trainable)


def trajectory(*spans: Span, **more: object) -> Trajectory:
    return Trajectory(id="t", task_id="q", task_hash="h", spans=spans, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", list(itertools.product([0, 1, 2], repeat=3)))
def test_num_targets_is_the_sum_of_is_target(lengths: tuple[int, ...]) -> None:
    for flags in itertools.product([False, True], repeat=3):
        t = trajectory(*(span(n, f) for n, f in zip(lengths, flags, strict=True)))
        assert t.num_targets == sum(t.is_target) and len(t.is_target) == t.num_tokens == len(t.token_ids)
        assert not t.is_target or not t.is_target[0]


def test_behaviour_logprobs_are_unknown_once_a_context_was_changed() -> None:
    known = replace(span(2, True), author="student", logprobs=(-1.0, -2.0))
    assert trajectory(span(1, False), known).behaviour_logprobs == (0.0, -1.0, -2.0)
    stripped = replace(known, is_context_exact=False)
    assert trajectory(span(1, False), stripped).behaviour_logprobs is None


def test_spans_say_what_is_wrong() -> None:
    with pytest.raises(DataError, match=r"Span.logprobs needs one entry per token \(2\), got 1"):
        Span(token_ids=(1, 2), role="user", author="u", logprobs=(0.0,))
    with pytest.raises(DataError, match="'user' by 'u' is marked trainable but not sampled"):
        Span(token_ids=(1,), role="user", author="u", is_trainable=True)


def test_a_draw_is_rewritten_whole_or_not_at_all() -> None:
    task = Task(id="q", messages=({"role": "user", "content": "?"},))
    draw = Draw(groups=(Group(task=task, trajectories=(trajectory(), trajectory())), Group(task=task, trajectories=())))
    marked = draw.with_trajectories([t.marked("x") for t in draw], **{"data/n": 2.0})
    assert [t.marks for t in marked] == [("x",), ("x",)] and marked.stats == {"data/n": 2.0}
    assert marked.kept() == [] and len(marked) == 2
    with pytest.raises(DataError, match="a draw of 2 trajectories cannot be rewritten with 1: none may be lost"):
        draw.with_trajectories([trajectory()])


def test_seeds_and_hashes_depend_on_every_part_and_on_nothing_else() -> None:
    parts = [(0, 0), (0, 1), (1, 0), ("0", 0), (0,), (0, 0, "x")]
    seeds = [seed_for(*p) for p in parts]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert seed_for(0, 1) == 1383206770300706774  # the same on any machine: a stored run depends on it
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1}) != content_hash({"a": 1, "b": 3})


def test_verdicts_and_params() -> None:
    assert Verdict(status=Status.ACCEPT).is_accepted and not Verdict(status=Status.ERROR).is_accepted
    assert SamplingParams(temperature=0).is_greedy and not SamplingParams(top_p=0.9).samples_own_distribution
