"""Probes of a tabular policy, and KLs from samples against enumeration."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tutelage.errors import DataError, SamplerError
from tutelage.monitors.drift import mean_nll, nll_by_task, sampled_kl
from tutelage.monitors.probe import Prober, count_task, run_probe
from tutelage.types import (
    Completion,
    DrawContext,
    SamplingParams,
    Span,
    Status,
    Task,
    Trajectory,
    Verdict,
    content_hash,
)

TASKS = [Task(id=f"q{i}", messages=({"role": "user", "content": f"{i}?"},), answer=str(i % 3)) for i in range(6)]


class OneToken:
    """Answers with one of three tokens by the same known probabilities for every prompt."""

    author = "student"

    def __init__(self, p=(0.5, 0.3, 0.2), version="v0"):
        self.p, self.version, self.calls = np.array(p), version, []

    def sample(self, requests, params, *, progress=None):
        self.calls.append((list(requests), params))
        out = []
        for r in requests:
            tokens = np.random.default_rng(r.seed).choice(3, size=r.n, p=self.p)
            out.append([self.completion(int(t)) for t in tokens])
        return out

    def completion(self, token):
        h = float(-(self.p * np.log(self.p)).sum())
        return Completion(
            token_ids=(token,), logprobs=(math.log(self.p[token]),), entropies=(h,), finish="stop", text=str(token)
        )


class Table:
    """Scores tokens by known probabilities."""

    def __init__(self, p):
        self.p = p

    def score(self, trajectories):
        return [[math.log(self.p[t]) for t in traj.spans[-1].token_ids] for traj in trajectories]


class Exact:
    name, version = "exact", "1"

    def judge(self, task, trajectories):
        return [
            Verdict(status=Status.ACCEPT if t.completion == task.answer else Status.REJECT, score=0.0)
            for t in trajectories
        ]


class Text:
    fingerprint = "bytes"

    def render_prompt(self, task):
        return [Span(token_ids=tuple(task.id.encode()), role="user", author="user")]


def make_trajectory(task, completion):
    span = completion.as_span("student", "v0", SamplingParams())
    return Trajectory(
        id=f"{task.id}/{completion.text}",
        task_id=task.id,
        task_hash=task.hash,
        spans=(Span(token_ids=(0,), role="user", author="user"), span),
        completion=completion.text,
    )


def take(sampler, **overrides):
    how = dict(text=Text(), n=16, seed=0, step=40) | overrides
    return run_probe(sampler, TASKS, Exact(), **how)


def test_a_probe_counts_every_sample_at_temperature_1():
    sampler = OneToken()
    probe, samples = take(sampler)
    assert sampler.calls[0][1] == SamplingParams(temperature=1.0, top_p=1.0)
    assert len(samples) == 96 and {t.verdict.status for t in samples} == {Status.ACCEPT, Status.REJECT}
    assert [t.n for t in probe.tasks] == [16] * 6
    for task, counts in zip(TASKS, probe.tasks, strict=True):
        own = [t for t in samples if t.task_id == task.id]
        assert counts.c == sum(t.completion == task.answer for t in own)
        assert counts.keys == (content_hash(task.answer),) * counts.c and counts.distinct == min(1, counts.c)
        assert counts.entropy_tokens == 16
    h = float(-(sampler.p * np.log(sampler.p)).sum())
    assert probe.entropy.token_mean == pytest.approx(h)
    assert probe.entropy.monte_carlo == pytest.approx(h, abs=0.15)
    assert (probe.step, probe.tokens, probe.version, probe.samples) == (40, 96, "v0", 16)


def test_equal_weights_give_an_equal_probe_and_seeds_are_by_task():
    first, second = take(OneToken())[0], take(OneToken())[0]
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    sampler = OneToken()
    take(sampler)
    assert len({r.seed for r in sampler.calls[0][0]}) == 6


def test_errors_leave_the_counts_but_not_the_entropy():
    judged = [
        replace(make_trajectory(TASKS[0], OneToken().completion(0)), verdict=Verdict(status=status))
        for j, status in enumerate([Status.ACCEPT, Status.ERROR, Status.REJECT, Status.ERROR])
    ]
    counts = count_task("q0", judged)
    assert (counts.n, counts.c, counts.errors, counts.entropy_tokens) == (2, 1, 2, 4)
    nothing = count_task("q0", [judged[1]])
    assert nothing.answer_entropy is None and nothing.n == 0
    with pytest.raises(DataError, match="has no verdict"):
        count_task("q0", [make_trajectory(TASKS[0], OneToken().completion(0))])


def test_a_sampler_that_returns_too_little_is_named():
    class Short(OneToken):
        def sample(self, requests, params, *, progress=None):
            return super().sample(requests, params)[1:]

    with pytest.raises(SamplerError, match="6 prompts with 16 samples each"):
        take(Short())


# -- drift --------------------------------------------------------------------------------------

P, Q = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)
KL_PQ = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))


def sampled(p, task="t0", token=0):
    return make_trajectory(replace(TASKS[0], id=task), OneToken(p).completion(token))


def test_sampled_kl_is_unbiased_by_enumeration():
    mean = sum(p * sampled_kl([sampled(P, token=i)], Table(Q)).value for i, p in enumerate(P))
    assert mean == pytest.approx(KL_PQ, rel=1e-12)


def test_direction_author_first():
    """Samples in exact proportion: KL(author || scorer), not the other way round."""
    exact = [sampled(P, task=f"t{j}", token=i) for j in range(2) for i, p in enumerate(P) for _ in range(round(10 * p))]
    assert sampled_kl(exact, Table(Q)).value == pytest.approx(KL_PQ, rel=1e-12)
    other_way = sum(q * math.log(q / p) for p, q in zip(P, Q, strict=True))
    assert abs(KL_PQ - other_way) > 0.03
    assert sampled_kl(exact, Table(P)).value == pytest.approx(0, abs=1e-12)


def test_sampled_kl_interval_covers():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(40):
        tokens = rng.choice(3, size=(40, 4), p=P)
        samples = [sampled(P, task=f"t{i}", token=int(t)) for i, row in enumerate(tokens) for t in row]
        e = sampled_kl(samples, Table(Q))
        hits += e.low <= KL_PQ <= e.high
    assert hits >= 33


def test_sampled_kl_refuses_what_is_not_the_models_own_distribution():
    t = sampled(P)
    shaped = replace(t, spans=(t.spans[0], replace(t.spans[1], sampling=SamplingParams(temperature=0.7))))
    with pytest.raises(DataError, match=r"drawn with SamplingParams\(temperature=0.7"):
        sampled_kl([shaped], Table(Q))
    unknown = replace(t, spans=(t.spans[0], replace(t.spans[1], logprobs=None)))
    with pytest.raises(DataError, match="unknown log-probabilities"):
        sampled_kl([unknown], Table(Q))
    with pytest.raises(DataError, match="at least one target token"):
        sampled_kl([], Table(Q))


def test_nll_weighs_tokens_and_can_be_had_by_task():
    class Fixed:
        def score(self, trajectories):
            return [[-1.0] * n for n in (1, 3)]

    class Uneven:
        def score(self, trajectories):
            return [[-1.0], [-2.0, -2.0, -2.0]]

    two = [sampled(P, task="a"), sampled(P, task="b")]
    assert mean_nll(two, Fixed()).value == pytest.approx(1.0)
    assert mean_nll(two, Uneven()).value == pytest.approx(7 / 4)
    assert nll_by_task(two, Uneven()) == {"a": 1.0, "b": 2.0}

    class Broken:
        def score(self, trajectories):
            return [[-math.inf], [-1.0]]

    with pytest.raises(DataError, match="not finite"):
        mean_nll(two, Broken())


# -- the prober ---------------------------------------------------------------------------------


def prober(step, **overrides):
    how = dict(text=Text(), seed=0, step=step) | overrides
    return Prober(TASKS, Exact(), **how)


def context(sampler, round=0):
    return DrawContext(seed=0, stage=0, round=round, sampler=lambda name: sampler)


def test_one_state_of_the_weights_is_sampled_once():
    sampler, step = OneToken(), [0]
    p = prober(lambda: step[0])
    assert p(context(sampler)) is p(context(sampler))
    assert len(sampler.calls) == 1
    step[0] = 20
    assert p(context(sampler)).step == 20
    sampler.version = "v1"
    assert p(context(sampler)).version == "v1"
    assert len(sampler.calls) == 3


def test_the_prober_measures_drift_both_ways_and_held_out_nll():
    base_samples = [sampled(P, task=f"t{j}", token=i) for j in range(5) for i in range(3)]
    p = prober(
        lambda: 0,
        base_scorer=Table(P),
        base_samples=base_samples,
        policy_scorer=Table(Q),
        heldout=base_samples[:3],
        extras=lambda ctx: {"at_temperature_cap": True, "tokens": 5},
    )
    probe = p(context(OneToken(Q, version="v1")))
    assert probe.kl_forward.value == pytest.approx(sampled_kl(base_samples, Table(Q)).value)
    assert probe.kl_reverse.value == pytest.approx(sampled_kl(p.samples, Table(P)).value)
    assert probe.kl_reverse.value > 0.1
    assert probe.heldout_nll.value == pytest.approx(-sum(map(math.log, Q)) / 3)
    assert probe.at_temperature_cap is True
    bare = prober(lambda: 0)(context(OneToken()))
    assert bare.kl_forward is None and bare.kl_reverse is None and bare.heldout_nll is None


def test_a_context_without_a_sampler_is_refused():
    with pytest.raises(DataError, match="sampler of 'student'"):
        prober(lambda: 0)(DrawContext(seed=0, stage=0, round=0))
