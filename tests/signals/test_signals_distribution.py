"""TeacherDistribution: its expected gradient is its divergence's, whatever the plumbing."""

from dataclasses import replace

import distillation_cases as cases
import numpy as np
import pytest
import torch

from tutelage.data.collate import collate
from tutelage.errors import ConfigError, DataError
from tutelage.numerics import divergence as kl
from tutelage.numerics.logprobs import target_logprobs
from tutelage.policies.table import TablePolicy
from tutelage.policies.teachers import AveragedTeacher, InProcessTeacher, SelfTeacher
from tutelage.signals.distribution import TeacherDistribution
from tutelage.signals.sampled import SampledLogRatio
from tutelage.train.distributed import Processes
from tutelage.types import RECORDED, SamplingParams, Span

FORMS = {
    "forward_kl": (kl.forward_kl, {}),
    "reverse_kl": (kl.reverse_kl, {}),
    "jsd": (lambda s, t: kl.jsd(s, t, 0.3, normalised=True), {"beta": 0.3}),
    "jsd_plain": (lambda s, t: kl.jsd(s, t, 0.3), {"beta": 0.3, "normalised": False}),
    "skew_kl": (lambda s, t: kl.skew_kl(s, t, 0.2), {"skew": 0.2}),
    "skew_reverse_kl": (lambda s, t: kl.skew_reverse_kl(s, t, 0.2), {"skew": 0.2}),
}


def signal_of(teacher, form="forward_kl", **kwargs):
    return TeacherDistribution(
        teacher, form.removesuffix("_plain"), divisor="sequences", **{**FORMS[form][1], **kwargs}
    )


@pytest.mark.parametrize("form", FORMS)
def test_expected_gradient_is_the_divergences_at_the_students_prefixes(form):
    policy, teacher = cases.student(), cases.teacher()
    all_y = cases.every_completion(policy)
    got = cases.expected_gradient(policy, signal_of(teacher, form), cases.draw_of(all_y))
    cases.same(got, cases.exact_gradient(policy, teacher, FORMS[form][0], all_y))


@pytest.mark.parametrize("form", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("layout,max_tokens,chunk", [("packed", 7, 3), ("packed", 2048, 5), ("padded", 20, 4)])
def test_a_step_does_not_depend_on_microbatches_packing_or_chunks(form, layout, max_tokens, chunk):
    teacher = cases.teacher()
    ys = cases.every_completion(cases.student())[:9]
    want, m = cases.gradient(cases.student(), signal_of(teacher, form, alpha=0.3), cases.draw_of(ys))
    got, n = cases.gradient(
        cases.student(chunk_size=chunk),
        signal_of(teacher, form, alpha=0.3),
        cases.draw_of(ys),
        layout=layout,
        max_tokens=max_tokens,
    )
    cases.same(got["table_VD"], want["table_VD"], 1e-10)
    assert abs(m["train/loss"] - n["train/loss"]) < 1e-10


def test_hinton_mixes_hard_targets_and_scales_by_temperature_squared():
    policy, teacher = cases.student(), cases.teacher()
    ys = cases.every_completion(policy)[:5]

    def exact(s, t):
        raise AssertionError

    policy.zero_grad()
    total = 0.0
    for y in ys:
        tokens = torch.tensor([y.token_ids])
        s, t = (p.logits(tokens)[0, 1:-1] for p in (policy, teacher.policy))
        soft = kl.hinton_loss(s, t.detach(), tokens[0, 2:], alpha=0.25, temperature=3.0)
        total = total + y.weight * soft.sum()
    (want,) = torch.autograd.grad(total, policy.table_VD)
    signal = signal_of(teacher, alpha=0.25, temperature=3.0)
    cases.same(cases.expected_gradient(policy, signal, cases.draw_of(ys, on_policy=False)), want)
    plain = signal_of(teacher, alpha=0.0, temperature=3.0, t_squared=False)
    scaled = signal_of(teacher, alpha=0.0, temperature=3.0)
    draw = cases.draw_of(ys, on_policy=False)
    a, b = (cases.expected_gradient(policy, s, draw) for s in (plain, scaled))
    cases.same(9.0 * a, b)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.7), SamplingParams(temperature=1.4, top_p=0.8)])
@pytest.mark.parametrize("form", ["reverse_kl", "jsd", "skew_reverse_kl"])
def test_the_graded_distribution_is_the_sampled_one(params, form):
    policy, teacher = cases.student(), cases.teacher()
    all_y = cases.every_completion(policy, params=params)
    got = cases.expected_gradient(policy, signal_of(teacher, form, t_squared=False), cases.draw_of(all_y))
    cases.same(got, cases.exact_gradient(policy, teacher, FORMS[form][0], all_y, params=params))


def test_a_loss_at_another_temperature_than_the_samples_is_refused():
    policy, teacher = cases.student(), cases.teacher()
    draw = cases.draw_of(cases.every_completion(policy, params=SamplingParams(temperature=0.9))[:2])
    signal = signal_of(teacher, temperature=1.0)
    with pytest.raises(DataError, match=r"temperature 0\.9.*temperature 1,"):
        signal.prepare(draw, score_student=None)
    signal_of(teacher, temperature=0.9).prepare(draw, score_student=None)
    signal_of(teacher, temperature=1.0, allow_shape_gap=True).prepare(draw, score_student=None)
    cut = cases.draw_of(cases.every_completion(policy, params=SamplingParams(top_p=0.5))[:2])
    with pytest.raises(DataError, match="infinite"):
        signal_of(teacher).prepare(cut, score_student=None)


def test_the_students_share_of_a_mixed_draw_is_graded_as_it_was_sampled():
    policy, teacher = cases.student(), cases.teacher()
    fresh = cases.every_completion(policy, params=SamplingParams(temperature=0.5))[0]
    gold = cases.trajectory((1, 2, 3), author="human", at="gold")
    earlier = replace(fresh, marks=(RECORDED,))
    signal = signal_of(teacher, temperature=1.0)
    with pytest.raises(DataError, match=r"temperature 0\.5.*temperature 1,"):
        signal.prepare(cases.draw_of([gold, fresh], on_policy=False, author="mixed"), score_student=None)
    signal.prepare(cases.draw_of([gold, earlier], on_policy=False, author="mixed"), score_student=None)
    signal.prepare(cases.draw_of([fresh], on_policy=False, author="recorded"), score_student=None)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_greedy_answers_are_no_on_policy_samples(temperature):
    teacher = cases.teacher()
    greedy = cases.trajectory((1, 2, 3), params=SamplingParams(temperature=0.0), logprobs=[-1.0] * 3)
    signal = signal_of(teacher, "reverse_kl", temperature=temperature)
    for draw in (cases.draw_of([greedy]), cases.draw_of([greedy], on_policy=False, author="mixed")):
        with pytest.raises(DataError, match="greedily"):
            signal.prepare(draw, score_student=None)
        with pytest.raises(DataError, match="greedily"):
            SampledLogRatio(teacher).prepare(draw, score_student=None)
    signal.prepare(cases.draw_of([greedy], on_policy=False), score_student=None)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_top_k_with_tail_is_the_divergence_over_k_plus_one_outcomes(divergence):
    policy, teacher = cases.student(), cases.teacher()
    ys = cases.every_completion(policy)

    def exact(s, t):
        values, ids = t.log_softmax(-1).topk(2, -1)
        return kl.top_k_kl(s, ids, values, direction=divergence.removesuffix("_kl"))

    signal = TeacherDistribution(teacher, divergence, estimator="top_k_tail", top_k=2, divisor="sequences")
    got = cases.expected_gradient(policy, signal, cases.draw_of(ys))
    cases.same(got, cases.exact_gradient(policy, teacher, exact, ys))
    whole = TeacherDistribution(teacher, divergence, estimator="top_k_tail", top_k=cases.V, divisor="sequences")
    full = TeacherDistribution(teacher, divergence, divisor="sequences")
    cases.same(*(cases.expected_gradient(policy, s, cases.draw_of(ys)) for s in (whole, full)))


def test_no_gradient_reaches_the_teacher():
    policy = cases.student()
    other = TablePolicy(cases.V, order=2, seed=2)
    teacher = InProcessTeacher(other)
    before = other.table_VD.detach().clone()
    cases.gradient(policy, signal_of(teacher, "jsd"), cases.draw_of(cases.every_completion(policy)[:4]))
    assert other.table_VD.grad is None and torch.equal(other.table_VD, before)
    # As its own teacher with the same context the student has nothing to learn, and stays trainable.
    grads, _ = cases.gradient(policy, signal_of(SelfTeacher(policy)), cases.draw_of(cases.every_completion(policy)[:4]))
    assert grads["table_VD"].abs().max() < 1e-15 and policy.training


# -- several teachers -----------------------------------------------------------------------------------------------


def two_task_draw(policy):
    ys = cases.every_completion(policy)[:8]
    return cases.draw_of([replace(y, task_name="ab"[i % 2], task_id="ab"[i % 2], id=str(i)) for i, y in enumerate(ys)])


@pytest.mark.parametrize("layout,max_tokens", [("packed", 2048), ("packed", 9), ("padded", 12)])
def test_every_task_is_graded_by_its_own_teacher(layout, max_tokens):
    policy = cases.student(chunk_size=5)
    one, two = cases.teacher(seed=5, order=1, name="one"), cases.teacher(seed=6, order=2, name="two")
    draw = two_task_draw(policy)
    signal = signal_of({"a": one, "*": two}, "reverse_kl")
    got = cases.gradient(policy, signal, draw, layout=layout, max_tokens=max_tokens)[0]["table_VD"] * len(draw)
    want = sum(
        cases.exact_gradient(policy, t, kl.reverse_kl, [y for y in draw if y.task_name == name])
        for name, t in (("a", one), ("b", two))
    )
    cases.same(got, want)


def test_divergence_is_reported_by_teacher_and_position():
    policy = cases.student()
    one, two = cases.teacher(seed=5, order=1, name="one"), cases.teacher(seed=6, order=2, name="two")
    draw = two_task_draw(policy)
    signal = signal_of({"a": one, "b": two}, "forward_kl")
    _, metrics = cases.gradient(policy, signal, draw, max_tokens=9)
    for name, t in (("a", one), ("b", two)):
        own = [y for y in draw if y.task_name == name]
        nats = []
        for y in own:
            tokens = torch.tensor([y.token_ids])
            s, p = (m.logits(tokens)[0, 1:-1] for m in (policy, t.policy))
            nats.append(kl.forward_kl(s, p).sum().item())
        got = metrics[f"distill/divergence_nats_per_target/{t.name}"]
        assert got == pytest.approx(sum(nats) / (len(own) * cases.LENGTH), abs=1e-12)
    assert metrics["distill/divergence_nats_per_target/targets_0_to_15"] == pytest.approx(
        metrics["distill/divergence_nats_per_target"]
    )
    assert 0.99 < metrics["distill/frac_top16_shared"] <= 1.0  # four tokens: all are in the top 16
    assert signal.take_sums() == {}


def test_a_task_without_a_teacher_is_named():
    policy = cases.student()
    with pytest.raises(DataError, match=r"\['b'\].*\['a'\]"):
        signal_of({"a": cases.teacher()}).prepare(two_task_draw(policy), score_student=None)


# -- the teacher's own view -----------------------------------------------------------------------------------------


def hinted(task, y):
    hint = Span(token_ids=(3, 1, 3), role="system", author="user")
    return replace(y, spans=(hint, *y.spans))


@pytest.mark.parametrize("layout,max_tokens", [("packed", 2048), ("padded", 11)])
def test_the_teacher_reads_its_hint_and_grades_the_same_tokens(layout, max_tokens):
    policy = TablePolicy(cases.V, order=4, seed=1)  # sees past the prompt, so the hint matters
    teacher = SelfTeacher(policy, max_tokens=9)
    ys = cases.every_completion(policy)[:7]
    signal = signal_of(teacher, "forward_kl", view=hinted)
    got = cases.gradient(policy, signal, cases.draw_of(ys), layout=layout, max_tokens=max_tokens)[0]["table_VD"]
    total = 0.0
    for y in ys:
        own, seen = torch.tensor([y.token_ids]), torch.tensor([hinted(None, y).token_ids])
        s, t = policy.logits(own)[0, 1:-1], policy.logits(seen)[0, 4:-1].detach()
        total = total + y.weight * kl.forward_kl(s, t).sum()
    (want,) = torch.autograd.grad(total, policy.table_VD)
    cases.same(got * len(ys), want)
    assert got.abs().max() > 1e-3


def test_a_view_may_not_change_the_answer():
    def other(task, y):
        return replace(y, spans=(y.spans[0], replace(y.spans[1], token_ids=y.spans[1].token_ids[::-1])))

    policy = cases.student()
    draw = cases.draw_of([cases.trajectory((0, 1, 2))])
    with pytest.raises(DataError, match="only what comes before the answer"):
        signal_of(SelfTeacher(policy), view=other).prepare(draw, score_student=None)


def test_rows_of_weight_zero_and_targets_left_out_change_nothing():
    policy, teacher = cases.student(), cases.teacher()
    ys = cases.every_completion(policy)[:6]
    kept = [replace(y, weight=0.0) if i % 2 else y for i, y in enumerate(ys)]
    a = cases.gradient(policy, signal_of(teacher, view=lambda t, y: y), cases.draw_of(kept))[0]["table_VD"]
    b = cases.gradient(policy, signal_of(teacher), cases.draw_of(ys[::2]))[0]["table_VD"]
    cases.same(a, b)


# -- an average of the student's weights ----------------------------------------------------------------------------


def test_the_averaged_teacher_follows_the_students_weights_and_comes_back_exactly(tmp_path):
    policy = cases.student()
    start = policy.table_VD.detach().clone()
    teacher = AveragedTeacher(policy, decay=0.75)
    signal = signal_of(teacher, "reverse_kl")
    draw = cases.draw_of(cases.every_completion(policy)[:5])
    expected = start.clone()
    for _ in range(3):
        cases.gradient(policy, signal, draw)
        with torch.no_grad():
            policy.table_VD.mul_(0.8)
        signal.after_step(policy)
        expected = 0.75 * expected + 0.25 * policy.table_VD.detach()
    cases.same(teacher.average["table_VD"], expected)
    signal.save(tmp_path)
    again = signal_of(AveragedTeacher(policy, decay=0.75), "reverse_kl")
    again.restore(signal.state())
    again.load(tmp_path)
    assert torch.equal(again.router.teachers[0].average["table_VD"], teacher.average["table_VD"])
    assert again.state() == signal.state() == {"teachers": {"average": {"num_updates": 3, "decay": 0.75}}}
    a, b = (cases.gradient(policy, s, draw)[0]["table_VD"] for s in (signal, again))
    assert torch.equal(a, b)
    want = InProcessTeacher(TablePolicy(cases.V, order=1))
    with torch.no_grad():
        want.policy.table_VD.copy_(expected)
    cases.same(a, cases.gradient(policy, signal_of(want, "reverse_kl"), draw)[0]["table_VD"])


# -- what cannot be configured --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({"divergence": "reverse_kl", "estimator": "top_k", "top_k": 8}, "top_k_tail"),
        ({"divergence": "forward_kl", "estimator": "top_k", "top_k": 8}, "top_k_tail"),
        ({"divergence": "reverse_kl", "estimator": "top_k_tail", "top_k": 1}, "policy_gradient"),
        ({"divergence": "reverse_kl", "estimator": "k1"}, "expected gradient of 0"),
        ({"divergence": "reverse_kl", "estimator": "k3"}, "forward KL's gradient"),
        ({"divergence": "reverse_kl", "estimator": "policy_gradient_k3"}, "policy_gradient"),
        ({"divergence": "jsd", "estimator": "top_k_tail", "top_k": 8}, "forward or reverse"),
        ({"divergence": "jsd", "beta": 1.0, "normalised": False}, "reverse_kl"),
        ({"divergence": "jsd", "beta": 1.5}, "beta must be in"),
        ({"divergence": "skew_kl", "skew": 1.0}, "0.1"),
        ({"divergence": "kl"}, "forward_kl, reverse_kl"),
        ({"alpha": 1.0}, "HardTargets"),
        ({"temperature": 0.0}, "positive"),
        ({"estimator": "top_k_tail"}, "needs top_k"),
    ],
)
def test_pairs_and_numbers_that_make_no_sense_are_refused(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        TeacherDistribution(cases.teacher(), **kwargs)


def test_the_refused_pairs_do_fail_enumeration():
    """What the refusals claim, for one position: expected gradients over the vocabulary against the divergence's."""
    s = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    t = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reverse, forward = (torch.autograd.grad(f(s, t), s)[0] for f in (kl.reverse_kl, kl.forward_kl))
    q = s.detach().softmax(-1)
    lq, lp = s.log_softmax(-1), t.log_softmax(-1)
    d = lq - lp
    k3 = torch.expm1(-d) + d

    def expectation(loss):
        return torch.autograd.grad((q * loss).sum(), s, retain_graph=True)[0]

    assert expectation(d).abs().max() < 1e-12
    cases.same(expectation(k3), forward)
    cases.same(expectation(d.square() / 2), reverse)
    cases.same(expectation(d.detach() * lq), reverse)
    wrong = expectation(k3.detach() * lq)
    assert all(torch.cosine_similarity(wrong, g, dim=0) < 0.9 for g in (forward, reverse))
    # One token and a tail: the sampled token as the only one kept, in expectation over what is sampled.
    s, t = (3 * torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (2, 3))
    s.requires_grad_()
    (reverse,) = torch.autograd.grad(kl.reverse_kl(s, t).sum(), s)
    kept = [
        p * kl.top_k_kl(s, torch.tensor([[v]]), t.log_softmax(-1)[:, v : v + 1], direction="reverse").sum()
        for v, p in enumerate(s.detach().softmax(-1)[0])
    ]
    (two,) = torch.autograd.grad(sum(kept), s)
    assert two.norm() < 0.9 * reverse.norm() or torch.cosine_similarity(two, reverse).item() < 0.95


def test_equal_models_have_no_loss_whatever_the_form():
    policy = cases.student()
    twin = InProcessTeacher(TablePolicy(cases.V, order=1, seed=1))
    draw = cases.draw_of(cases.every_completion(policy)[:4])
    for form in FORMS:
        grads, metrics = cases.gradient(policy, signal_of(twin, form), draw)
        assert abs(metrics["train/loss"]) < 1e-12 and grads["table_VD"].abs().max() < 1e-12
    assert np.isfinite(metrics["train/grad_norm"])


def test_a_padded_vocabulary_is_cut_to_the_shared_part():
    wide = TablePolicy(cases.V, order=1, seed=3)
    with torch.no_grad():
        wide.table_VD = torch.nn.Parameter(torch.cat([wide.table_VD, torch.randn(3, cases.V + 1).double()]))
    teacher = InProcessTeacher(wide, vocab_size=cases.V)
    policy = cases.student()
    draw = cases.draw_of(cases.every_completion(policy)[:5])
    got = cases.gradient(policy, signal_of(teacher), draw)[0]["table_VD"]
    narrow = InProcessTeacher(TablePolicy(cases.V, order=1, seed=3))
    cases.same(got, cases.gradient(policy, signal_of(narrow), draw)[0]["table_VD"])


def test_a_student_wider_than_the_teacher_is_graded_on_the_shared_part():
    policy, teacher = cases.student(), cases.teacher()
    narrow = InProcessTeacher(teacher.policy, vocab_size=cases.V - 1)
    ys = [y for y in cases.every_completion(policy) if max(y.token_ids) < cases.V - 1][:6]

    def exact(s, t):
        return kl.reverse_kl(s[..., :-1], t[..., :-1])

    got = cases.expected_gradient(policy, signal_of(narrow, "reverse_kl"), cases.draw_of(ys))
    cases.same(got, cases.exact_gradient(policy, teacher, exact, ys))
    assert (got[-1] == 0).all()


def test_target_logprobs_helper_agrees_with_the_teachers_score():
    teacher = cases.teacher(max_tokens=6)
    ys = cases.every_completion(cases.student())[:5]
    for y, scores in zip(ys, teacher.score(ys), strict=True):
        tokens = torch.tensor([y.token_ids])
        want = target_logprobs(teacher.policy.logits(tokens)[0, 1:-1], tokens[0, 2:])
        cases.same(torch.tensor(scores, dtype=torch.float64), want)


class OneOfTwo(Processes):
    """One of two processes that share the microbatches; the sums are made by the test."""

    count, index = 2, 0

    def __init__(self, index):
        super().__init__()
        self.index = index

    def sum_numbers(self, numbers):
        return dict(numbers)

    def sum_tensors(self, tensors):
        pass


def test_two_processes_add_up_to_one():
    teacher = cases.teacher()
    draw = cases.draw_of(cases.every_completion(cases.student())[:9])
    one = signal_of(teacher, "jsd")
    want, _ = cases.gradient(cases.student(), one, draw, max_tokens=9)
    total, sums = 0.0, []
    for index in range(2):
        policy, signal = cases.student(), signal_of(teacher, "jsd")
        trainer = cases.trainer_of(policy)
        trainer.processes = OneOfTwo(index)
        targets = signal.prepare(draw, score_student=None)
        cases.step(trainer, targets, signal, max_tokens=9)
        total = total + trainer.optimizer.gradients()["table_VD"]
        sums.append(signal.take_sums())
    cases.same(total, want["table_VD"])
    added = {n: sum(s.get(n, 0.0) for s in sums) for s in sums for n in s}
    a, b = signal.metrics(added), one.metrics(one.take_sums())
    assert a == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize("max_tokens", [7, 99])
def test_hidden_states_come_back_to_their_own_targets(max_tokens):
    """Targets left out one by one, rows of different lengths, teacher batches cut anew."""
    teacher = cases.teacher(max_tokens=max_tokens)
    ids = [(0, 1, 2, 3, 1, 0), (3, 2), (1, 1, 2, 0, 3), (2,)]
    draw = cases.draw_of([cases.trajectory(y, at=str(i)) for i, y in enumerate(ids)])
    signal = signal_of(teacher, view=lambda task, y: y)
    rows = []
    for i, r in enumerate(signal.prepare(draw, score_student=None).rows):
        weight = np.array([(i + j) % 3 != 1 for j in range(r.trajectory.num_targets)], dtype=float)
        rows.append(replace(r, columns={**r.columns, "weight_C": weight}))
    batch = collate(rows[::-1], layout="packed", dtype=torch.float64)
    got = signal.annotate(batch)["teacher_hidden_CE"]
    assert torch.equal(got.double(), teacher.hidden(batch).double()) and len(got) == batch.num_targets > 5
