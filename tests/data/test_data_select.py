"""Selection: each rule against a literal loop, and what is left out is counted."""

from dataclasses import replace

import pytest
from data_samples import simple
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.select import SelectionRules, select
from tutelage.data.store import TrajectoryStore, TrajectoryWriter
from tutelage.errors import ConfigError
from tutelage.types import Span, Status, Verdict


def sampled(prompt, said, length=1, status="accept", score=1.0, key=None, finish="stop", weight=1.0):
    span = Span(token_ids=(1,) * length, role="assistant", author="student", is_sampled=True, is_trainable=True)
    return simple(
        0,
        task_hash=f"h{prompt}",
        spans=(span,),
        messages=({"role": "assistant", "content": said},),
        completion=said,
        finish=finish,
        weight=weight,
        marks=() if weight else ("long paragraph",),
        verdict=None if status is None else Verdict(status=Status(status), score=score, key=key),
    )


SAMPLES = st.builds(
    sampled,
    prompt=st.integers(0, 2),
    said=st.sampled_from("abc"),
    length=st.integers(1, 4),
    status=st.sampled_from(["accept", "accept", "reject", "error", None]),
    score=st.sampled_from([None, 0.0, 0.5, 1.0]),
    key=st.sampled_from([None, "k1", "k2"]),
    finish=st.sampled_from(["stop", "stop", "length"]),
    weight=st.sampled_from([1.0, 1.0, 0.0]),
)
RULES = st.builds(
    SelectionRules,
    is_weighted=st.booleans(),
    is_accepted=st.booleans(),
    min_score=st.none() | st.just(0.5),
    is_whole=st.booleans(),
    max_tokens=st.none() | st.just(3),
    is_unique=st.booleans(),
    distinct=st.sampled_from([None, "text", "key"]),
    max_per_prompt=st.none() | st.integers(1, 2),
    order=st.sampled_from(["first", "shortest"]),
)


def literal(trajectories, r):
    """The rules said one row at a time."""
    rows = []
    for i, t in enumerate(trajectories):
        v = t.verdict
        fine = not r.is_weighted or t.weight != 0
        fine &= not r.is_accepted or (v is not None and v.status == "accept")
        fine &= r.min_score is None or (v is not None and v.score is not None and v.score >= r.min_score)
        fine &= not (r.is_whole and t.finish == "length")
        fine &= r.max_tokens is None or len(t.token_ids) <= r.max_tokens
        if fine:
            rows.append(i)
    if r.order == "shortest":
        rows.sort(key=lambda i: (len(trajectories[i].token_ids), i))

    def once(rows, same):
        seen, kept = set(), []
        for i in rows:
            if same(trajectories[i]) not in seen:
                kept.append(i)
                seen.add(same(trajectories[i]))
        return kept

    if r.is_unique:
        rows = once(rows, lambda t: t.completion)
    if r.distinct == "text":
        rows = once(rows, lambda t: (t.task_hash, t.completion))
    if r.distinct == "key":
        rows = once(
            rows,
            lambda t: (
                t.task_hash,
                ("key", t.verdict.key) if t.verdict and t.verdict.key is not None else t.completion,
            ),
        )
    if r.max_per_prompt is not None:
        count, kept = {}, []
        for i in rows:
            count[trajectories[i].task_hash] = count.get(trajectories[i].task_hash, 0) + 1
            if count[trajectories[i].task_hash] <= r.max_per_prompt:
                kept.append(i)
        rows = kept
    return sorted(rows)


@given(trajectories=st.lists(SAMPLES, max_size=14), rules=RULES)
@settings(max_examples=100, deadline=None)
def test_rules_do_what_they_say(trajectories, rules):
    chosen = select(trajectories, rules)
    assert chosen.is_kept.nonzero()[0].tolist() == literal(trajectories, rules)
    assert chosen.num_kept + sum(chosen.left_out.values()) == len(trajectories)
    assert list(chosen.of(trajectories)) == [trajectories[i] for i in literal(trajectories, rules)]


def test_a_store_is_selected_from_by_streaming(tmp_path):
    trajectories = [
        sampled(0, "a", 3),
        sampled(0, "a", 2),
        sampled(0, "b", 4),
        sampled(0, "c", 1, status="reject"),
        sampled(1, "d", 1, status="error"),
        sampled(1, "e", 1, status=None),
        sampled(1, "f", 2, finish="length"),
        sampled(1, "g", 9),
    ]
    with TrajectoryWriter(tmp_path / "s", rows_per_shard=3) as writer:
        writer.write_all(trajectories)
    rules = SelectionRules(is_whole=True, max_tokens=8, distinct="text", max_per_prompt=1, order="shortest")
    chosen = select(TrajectoryStore(tmp_path / "s"), rules)
    assert list(chosen.of(TrajectoryStore(tmp_path / "s"))) == [trajectories[1]]
    assert chosen.left_out == {
        **{"reject": 1, "error": 1, "unjudged": 1, "truncated": 1, "too long": 1},
        **{"not distinct": 1, "over the cap": 1},
    }


def test_equal_answers_of_different_prompts_are_distinct_but_not_unique():
    trajectories = [sampled(0, "4"), sampled(1, "4"), replace(sampled(1, "4"), id="other")]
    assert select(trajectories, SelectionRules(distinct="text")).num_kept == 2
    assert select(trajectories, SelectionRules(is_unique=True)).num_kept == 1


def test_keys_decide_where_there_are_keys_and_texts_elsewhere():
    trajectories = [
        *(sampled(0, "a", key="k"), sampled(0, "b", key="k"), sampled(0, "c", key="")),
        *(sampled(0, "d"), sampled(0, "e"), sampled(0, "d"), sampled(1, "a", key="k")),
    ]
    chosen = select(trajectories, SelectionRules(distinct="key"))
    assert [t.completion for t in chosen.of(trajectories)] == ["a", "c", "d", "e", "a"]


def test_wrong_rules_are_all_named():
    with pytest.raises(ConfigError) as caught:
        SelectionRules(max_tokens=0, max_per_prompt=0, distinct="words", order="longest")
    assert len(caught.value.problems) == 4
    assert "max_per_prompt must be at least 1 or None, got 0" in str(caught.value)
