"""Entropy, distinctness, novelty and balance against enumeration and by hand."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import DataError
from tutelage.monitors.entropy import (
    EntropyStats,
    NoveltyHistory,
    answer_entropy,
    balance_score,
    distinct_n,
    distinct_ngrams,
    duplicate_share,
    entropy_stats,
    solution_key,
)
from tutelage.types import SamplingParams, Span, Status, Trajectory, Verdict

OWN = SamplingParams()


def trajectory(entropies, logprobs=None, *, sampling=OWN, exact=True, text="", key=None):
    length = len(entropies if entropies is not None else logprobs)
    span = Span(
        token_ids=tuple(range(length)),
        role="assistant",
        author="student",
        is_sampled=True,
        is_trainable=True,
        entropies=entropies,
        logprobs=logprobs,
        sampling=sampling,
        is_context_exact=exact,
    )
    prompt = Span(token_ids=(9, 9), role="user", author="user", entropies=(5.0, 5.0))
    verdict = Verdict(status=Status.ACCEPT, key=key)
    return Trajectory(id="x", task_id="t", task_hash="h", spans=(prompt, span), completion=text, verdict=verdict)


def test_token_and_sequence_averages_differ_and_prompts_do_not_count():
    s = entropy_stats([trajectory((1.0, 1.0, 1.0, 1.0)), trajectory((0.0,))])
    assert s.token_mean == pytest.approx(0.8)
    assert s.sequence_mean == pytest.approx(0.5)
    assert (s.num_tokens, s.num_sequences, s.num_unknown) == (5, 2, 0)


def test_percentile_and_low_share():
    values = tuple(i / 100 for i in range(101))
    s = entropy_stats([trajectory(values)])
    assert s.p80 == pytest.approx(0.8)
    assert s.low_share == pytest.approx(1 / 101)  # 0.00 only: 0.01 is not below 0.01


def test_monte_carlo_is_minus_log_pi_and_only_from_the_models_own_distribution():
    s = entropy_stats([trajectory((0.5, 0.7), (-0.25, -1.25))])
    assert s.monte_carlo == pytest.approx(0.75)
    assert s.gap == pytest.approx(0.75 - 0.6)
    for other in (SamplingParams(temperature=0.7), SamplingParams(top_p=0.9), None):
        assert entropy_stats([trajectory((0.5, 0.7), (-0.25, -1.25), sampling=other)]).monte_carlo is None
    assert entropy_stats([trajectory((0.5, 0.7), (-0.25, -1.25), exact=False)]).monte_carlo is None
    assert entropy_stats([trajectory((0.5, 0.7))]).monte_carlo is None


def test_exact_and_sampled_entropy_agree_in_expectation():
    """Every token of a 3-token vocabulary, weighted by its probability: the mean of -log p is the entropy."""
    p = np.array([0.6, 0.3, 0.1])
    h = float(-(p * np.log(p)).sum())
    assert sum(q * entropy_stats([trajectory((h,), (math.log(q),))]).gap for q in p) == pytest.approx(0, abs=1e-12)


def test_unknown_entropies_are_counted_and_left_out():
    s = entropy_stats([trajectory(None, (-1.0, -2.0)), trajectory((0.4,))])
    assert (s.token_mean, s.num_unknown, s.num_sequences) == (0.4, 1, 2)
    nothing = entropy_stats([])
    assert nothing.token_mean is None and nothing.p80 is None and nothing.gap is None
    assert EntropyStats.from_json(json.loads(json.dumps(nothing.to_json()))) == nothing


def test_solution_key_is_the_tasks_own_or_the_text():
    assert solution_key(trajectory((0.1,), text=" 7 \n")) == "7"
    assert solution_key(trajectory((0.1,), text=" 7 \n", key="2+5")) == "2+5"


def test_answer_entropy_of_known_shares():
    assert answer_entropy(["a"] * 5) == 0
    assert answer_entropy(["a", "b", "c", "d"]) == pytest.approx(math.log(4))
    assert answer_entropy(["a", "a", "a", "b"]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    with pytest.raises(DataError, match="got none"):
        answer_entropy([])


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), st.data())
def test_distinct_n_is_the_mean_over_subsets(keys, data):
    n = data.draw(st.integers(1, len(keys)))
    subsets = list(itertools.combinations(keys, n))
    assert distinct_n(keys, n) == pytest.approx(sum(len(set(s)) for s in subsets) / len(subsets), abs=1e-12)


def test_distinct_ngrams_and_duplicates_by_hand():
    assert distinct_ngrams([(1, 2, 1, 2), (1, 2)], 2) == pytest.approx(2 / 4)
    assert distinct_ngrams([(1,)], 2) == 0
    assert duplicate_share({"a": ["x", "x", "y"], "b": ["x"]}) == pytest.approx(1 - 3 / 4)
    assert duplicate_share({"a": []}) is None


@pytest.mark.parametrize(
    ("distinct", "kept", "expected"), [(0, 0, 0), (8, 8, 1), (16, 16, 1), (4, 8, 0.25), (4, 4, 0.5), (8, 16, 0.5)]
)
def test_balance_score_of_known_counts(distinct, kept, expected):
    assert balance_score(distinct, kept) == pytest.approx(expected)


def test_balance_score_refuses_more_distinct_than_kept():
    with pytest.raises(DataError, match="got 3, 2, 8"):
        balance_score(3, 2)


def test_novelty_counts_new_solutions_by_task_over_all_accepted():
    history = NoveltyHistory()
    assert history.add({"a": ["x", "x"], "b": ["x"]})[0] == pytest.approx(2 / 3)
    novelty, fresh = history.add({"a": ["x", "y"]})
    assert novelty == pytest.approx(1 / 2) and len(fresh) == 1 and len(history) == 3
    restored = NoveltyHistory()
    restored.restore(json.loads(json.dumps(history.state())))
    assert restored.add({"a": ["x", "y"], "b": ["y"]})[0] == pytest.approx(1 / 3)
    history.forget(fresh)
    assert history.add({"a": ["y"]})[0] == 1
    assert history.add({"a": []}) == (None, [])
