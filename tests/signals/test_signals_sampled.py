"""Sampled reverse KL and MiniLLM: expectations by enumeration of every completion."""

import math
from dataclasses import replace

import distillation_cases as cases
import numpy as np
import pytest
import torch

from tutelage.errors import ConfigError, DataError
from tutelage.numerics import divergence as kl
from tutelage.policies.table import TablePolicy
from tutelage.policies.teachers import AveragedTeacher, InProcessTeacher, SelfTeacher
from tutelage.signals.distribution import TeacherDistribution
from tutelage.signals.minillm import MiniLLM
from tutelage.signals.sampled import SampledLogRatio
from tutelage.types import SamplingParams, Span


def sampled(teacher, **kwargs):
    return SampledLogRatio(teacher, divisor="sequences", **kwargs)


FORMS = [
    {},
    {"recompute": False},
    {"estimator": "k2"},
    {"clip": (0.2, 0.2)},
    {"sampler_cap": None},
]


@pytest.mark.parametrize("kwargs", FORMS, ids=str)
def test_expected_gradient_is_the_reverse_kls(kwargs):
    policy, teacher = cases.student(), cases.teacher()
    ys = cases.every_completion(policy)
    got = cases.expected_gradient(policy, sampled(teacher, **kwargs), cases.draw_of(ys))
    cases.same(got, cases.exact_gradient(policy, teacher, kl.reverse_kl, ys))
    full = TeacherDistribution(teacher, "reverse_kl", divisor="sequences")
    cases.same(got, cases.expected_gradient(policy, full, cases.draw_of(ys)))


@pytest.mark.parametrize("kwargs", [{}, {"clip": (0.2, 0.2)}], ids=str)
def test_undiscounted_the_expected_gradient_is_the_sequences_reverse_kls(kwargs):
    policy, teacher = cases.student(), cases.teacher()
    draw = cases.draw_of(cases.every_completion(policy))
    got = cases.expected_gradient(policy, sampled(teacher, discount=1.0, **kwargs), draw)
    cases.same(got, cases.sequence_reverse_kl_gradient(policy, teacher))


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.6), SamplingParams(temperature=1.3, top_p=0.75)])
def test_sampled_and_scored_distributions_are_one(params):
    policy, teacher = cases.student(), cases.teacher()
    ys = cases.every_completion(policy, params=params)
    got = cases.expected_gradient(policy, sampled(teacher), cases.draw_of(ys))
    cases.same(got, cases.exact_gradient(policy, teacher, kl.reverse_kl, ys, params=params))


def test_after_an_update_the_ratio_keeps_the_expectation_exact():
    """Tokens of the old policy, weights moved since: the expected gradient is the new policy's own reverse KL."""
    policy, teacher = TablePolicy(cases.V, order=1, seed=1), cases.teacher()
    ys = cases.every_completion(policy, length=1)
    trainer = cases.trainer_of(policy)
    for kwargs in ({}, {"estimator": "k2"}):
        signal = sampled(teacher, **kwargs)
        targets = signal.prepare(cases.draw_of(ys), score_student=trainer.score)
        moved = TablePolicy(cases.V, order=1, seed=1)
        with torch.no_grad():
            moved.table_VD += 0.3 * torch.randn(
                moved.table_VD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
            )
        now = cases.trainer_of(moved)
        cases.step(now, targets, signal)
        got = now.optimizer.gradients()["table_VD"] * len(ys)
        fresh = [replace(y, weight=math.exp(sum(cases.shaped_logprobs(moved, y.token_ids[2:])))) for y in ys]
        cases.same(got, cases.exact_gradient(moved, teacher, kl.reverse_kl, fresh))


def test_a_sampler_with_other_probabilities_is_corrected():
    """Behaviour p~ instead of q: with its per-step weight a one-token draw has the student's own expectation."""
    policy, teacher = cases.student(), cases.teacher()
    q, p = ([cases.shaped_logprobs(m, (v,))[0] for v in range(cases.V)] for m in (policy, teacher.policy))
    mixture = [math.log(0.2 * math.exp(b) + 0.8 * math.exp(a)) for a, b in zip(q, p, strict=True)]
    ys = [
        cases.trajectory((v,), logprobs=[m], weight=math.exp(m), at=str(v), params=SamplingParams())
        for v, m in enumerate(mixture)
    ]
    own = cases.every_completion(policy, length=1)
    want = cases.exact_gradient(policy, teacher, kl.reverse_kl, own)
    got = cases.expected_gradient(policy, sampled(teacher), cases.draw_of(ys))
    cases.same(got, want)
    biased = cases.expected_gradient(policy, sampled(teacher, sampler_cap=None), cases.draw_of(ys))
    assert (biased - want).abs().max() > 1e-3
    # MiniLLM's first part has no weight, and a single token has no future.
    alone = cases.expected_gradient(policy, MiniLLM(teacher, divisor="sequences"), cases.draw_of(ys[:1]))
    cases.same(alone, cases.exact_gradient(policy, teacher, kl.reverse_kl, ys[:1]))
    cases.same(
        cases.expected_gradient(policy, MiniLLM(teacher, divisor="sequences"), cases.draw_of(ys)),
        want,
    )


def test_the_correction_is_cut_at_its_cap_and_counted():
    policy, teacher = cases.student(), cases.teacher()
    lps = cases.shaped_logprobs(policy, (0, 1, 2))
    y = cases.trajectory((0, 1, 2), logprobs=[lps[0] - 3.0, lps[1], lps[2] + 0.5])
    signal = sampled(teacher, sampler_cap=2.0)
    trainer = cases.trainer_of(policy)
    targets = signal.prepare(cases.draw_of([y]), score_student=trainer.score)
    assert targets.stats["policy/frac_sampler_weights_cut"] == pytest.approx(1 / 3)
    assert targets.stats["policy/mean_abs_sampler_gap_nats"] == pytest.approx(3.5 / 3)
    columns = {n: torch.as_tensor(np.asarray(c)) for n, c in targets.rows[0].columns.items()}
    columns |= {"target_ids_C": torch.tensor([0, 1, 2])}
    logits = policy.logits(torch.tensor([y.token_ids]))[0, 1:-1].detach()
    cost = torch.tensor(lps, dtype=torch.float64) - torch.tensor(teacher.score([y])[0], dtype=torch.float64)
    weight = torch.tensor([2.0, 1.0, math.exp(-0.5)], dtype=torch.float64)
    cases.same(signal.loss(logits, columns), weight * cost, 1e-10)


def test_clipping_stops_the_gradient_of_ratios_that_ran_away():
    policy, teacher = cases.student(), cases.teacher()
    y = cases.trajectory((1,), logprobs=cases.shaped_logprobs(policy, (1,)))
    signal = sampled(teacher, clip=(0.2, 0.2), sampler_cap=None)
    trainer = cases.trainer_of(policy)
    (row,) = signal.prepare(cases.draw_of([y]), score_student=trainer.score).rows
    columns = {n: torch.as_tensor(np.asarray(c)) for n, c in row.columns.items()} | {"target_ids_C": torch.tensor([1])}
    cost = row.columns["old_logprobs_C"][0] - row.columns["teacher_logprobs_C"][0]
    for bump in (-3.0, 3.0):
        logits = policy.logits(torch.tensor([y.token_ids]))[0, 1:-1].detach().clone()
        logits[0, 1] += bump
        logits.requires_grad_()
        (g,) = torch.autograd.grad(signal.loss(logits, columns).sum(), logits)
        ran_the_good_way = (bump > 0) == (cost < 0)
        assert bool((g == 0).all()) == ran_the_good_way


def test_environment_tokens_are_never_graded():
    """Two turns with a tool's answer between them: its tokens have no column, and only condition what follows."""
    policy, teacher = TablePolicy(cases.V, order=3, seed=1), cases.teacher(order=3)
    lps = [-1.0, -1.1]

    def turn(ids):
        return Span(
            token_ids=ids, role="assistant", author="student", is_sampled=True, is_trainable=True, logprobs=tuple(lps)
        )

    y = cases.trajectory((0,))
    tool = Span(token_ids=(3, 3, 1), role="tool", author="environment")
    y = replace(y, spans=(y.spans[0], turn((0, 1)), tool, turn((2, 1))))
    signal = sampled(teacher, discount=0.5)
    (row,) = signal.prepare(cases.draw_of([y]), score_student=cases.trainer_of(policy).score).rows
    assert {len(c) for c in row.columns.values()} == {4}
    tokens = torch.tensor([y.token_ids])
    at, ids = torch.tensor([1, 2, 6, 7]), torch.tensor([0, 1, 2, 1])
    lq, lp = (m.logits(tokens)[0].log_softmax(-1)[at, ids] for m in (policy, teacher.policy))
    cost = (lq - lp).tolist()
    assert row.columns["future_C"].tolist() == pytest.approx(
        [0.5 * cost[1] + 0.25 * cost[2] + 0.125 * cost[3], 0.5 * cost[2] + 0.25 * cost[3], 0.5 * cost[3], 0.0]
    )


@pytest.mark.parametrize("layout,max_tokens,chunk", [("packed", 7, 3), ("padded", 20, 4)])
def test_a_step_does_not_depend_on_the_plumbing(layout, max_tokens, chunk):
    ys = cases.every_completion(cases.student())[:9]
    for make in (lambda t: sampled(t, discount=0.5), lambda t: MiniLLM(t, divisor="sequences")):
        want, _ = cases.gradient(cases.student(), make(cases.teacher()), cases.draw_of(ys))
        got, _ = cases.gradient(
            cases.student(chunk_size=chunk),
            make(cases.teacher(max_tokens=6)),
            cases.draw_of(ys),
            layout=layout,
            max_tokens=max_tokens,
        )
        cases.same(got["table_VD"], want["table_VD"], 1e-10)


def test_a_teacher_that_changes_is_asked_at_every_update():
    policy = cases.student()
    ys = cases.every_completion(policy, params=SamplingParams(temperature=0.8))
    average = AveragedTeacher(policy, decay=0.5, max_tokens=9)
    with torch.no_grad():
        average.average["table_VD"] += cases.teacher(order=1).policy.table_VD
    same = InProcessTeacher(TablePolicy(cases.V, order=1))
    with torch.no_grad():
        same.policy.table_VD.copy_(average.average["table_VD"])
    a, b = (cases.gradient(policy, sampled(t), cases.draw_of(ys))[0]["table_VD"] for t in (average, same))
    cases.same(a, b)
    assert a.abs().max() > 1e-3
    signal = sampled(SelfTeacher(policy), discount=0.0)
    assert cases.gradient(policy, signal, cases.draw_of(ys))[0]["table_VD"].abs().max() < 1e-15


def test_several_teachers_by_task_and_their_divergence():
    policy = cases.student()
    one, two = cases.teacher(seed=5, order=1, name="one"), cases.teacher(seed=6, name="two")
    ys = [replace(y, task_name="ab"[i % 2], id=str(i)) for i, y in enumerate(cases.every_completion(policy)[:8])]
    draw = cases.draw_of(ys)
    signal = sampled({"a": one, "b": two})
    got = cases.expected_gradient(policy, signal, draw)
    parts = [
        cases.expected_gradient(policy, sampled(t), cases.draw_of([y for y in ys if y.task_name == n]))
        for n, t in (("a", one), ("b", two))
    ]
    cases.same(got, sum(parts))
    _, metrics = cases.gradient(policy, sampled({"a": one, "b": two}), draw)
    assert {"distill/divergence_nats_per_target/one", "distill/divergence_nats_per_target/two"} <= metrics.keys()


# -- MiniLLM --------------------------------------------------------------------------------------------------------


def test_minillm_without_length_norm_is_the_sequences_reverse_kl():
    policy, teacher = cases.student(), cases.teacher()
    draw = cases.draw_of(cases.every_completion(policy))
    got = cases.expected_gradient(policy, MiniLLM(teacher, length_norm=False, divisor="sequences"), draw)
    cases.same(got, cases.sequence_reverse_kl_gradient(policy, teacher))


def test_minillm_normalises_the_future_by_its_length():
    policy, teacher = cases.student(), cases.teacher()
    (y,) = cases.every_completion(policy)[5:6]
    signal = MiniLLM(teacher, divisor="sequences")
    (row,) = signal.prepare(cases.draw_of([y]), score_student=cases.trainer_of(policy).score).rows
    cost = np.array(cases.shaped_logprobs(policy, y.token_ids[2:])) - np.array(teacher.score([y])[0])
    np.testing.assert_allclose(row.columns["future_C"], [(cost[1] + cost[2]) / 2, cost[2], 0.0], rtol=1e-12)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({"estimator": "k1"}, 'estimator="policy_gradient"'),
        ({"estimator": "k3"}, "forward KL's gradient"),
        ({"estimator": "policy_gradient_k3"}, 'estimator="policy_gradient"'),
        ({"estimator": "full"}, "TeacherDistribution"),
        ({"estimator": "k2", "discount": 0.5}, "policy_gradient"),
        ({"discount": 1.5}, "discount must be in"),
        ({"clip": (1.2, 0.2)}, "at most 1"),
        ({"clip": (0.2, 0.2), "recompute": False}, "recompute"),
        ({"sampler_cap": 0.5}, "at least 1"),
    ],
)
def test_what_is_not_the_reverse_kls_gradient_is_refused(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        SampledLogRatio(cases.teacher(), **kwargs)


def test_a_moving_teacher_with_a_future_is_refused():
    with pytest.raises(ConfigError, match="changes during a draw"):
        SampledLogRatio(SelfTeacher(cases.student()), discount=0.5)
    with pytest.raises(ConfigError, match="do not change"):
        MiniLLM(SelfTeacher(cases.student()))


def test_tokens_nobody_sampled_here_are_refused():
    policy, teacher = cases.student(), cases.teacher()
    draw = cases.draw_of([cases.trajectory((0, 1), author="human")], on_policy=False)
    with pytest.raises(DataError, match="written by human"):
        sampled(teacher).prepare(draw, score_student=cases.trainer_of(policy).score)


class AtOne:
    """A server: scores at temperature 1 only."""

    name, form = "server", "top_k"

    def __init__(self, answers):
        self.answers = answers

    def score(self, trajectories):
        return [self.answers] * len(trajectories)


def test_a_server_that_cannot_shape_is_refused_and_wrong_answers_are_named():
    policy = cases.student()
    score = cases.trainer_of(policy).score
    (y,) = cases.every_completion(policy, params=SamplingParams(temperature=0.7))[:1]
    with pytest.raises(DataError, match=r"temperature 1 only.*0\.7"):
        sampled(AtOne([-1.0] * 3)).prepare(cases.draw_of([y]), score_student=score)
    (y,) = cases.every_completion(policy)[:1]
    for answers, words in (([-1.0] * 2, "got 2, of which 2"), ([-1.0, -2.0, -math.inf], "got 3, of which 2")):
        with pytest.raises(DataError, match=words):
            sampled(AtOne(answers)).prepare(cases.draw_of([y]), score_student=score)
    (row,) = sampled(AtOne([-1.0, -2.0, -3.0])).prepare(cases.draw_of([y]), score_student=score).rows
    assert row.columns["teacher_logprobs_C"].tolist() == [-1.0, -2.0, -3.0]
