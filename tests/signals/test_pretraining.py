"""A distillation with plain text beside it: the step is the sum of both losses' steps, whatever the signal."""

from dataclasses import replace

import distillation_cases as cases
import pytest
import torch

from tutelage.errors import ConfigError, DataError
from tutelage.policies.teachers import ServedTeacher
from tutelage.signals import HardTargets, MiniLLM, SampledLogRatio, TeacherDistribution, WithPretraining
from tutelage.signals.pretraining import PRETRAINING
from tutelage.types import Draw, Group, Span, Trajectory


def texts(*all_ids):
    task = cases.task(PRETRAINING)
    found = []
    for i, ids in enumerate(all_ids):
        span = Span(token_ids=ids, role="text", author="human", is_sampled=True, is_trainable=True)
        found.append(
            Trajectory(id=f"text{i}", task_id=task.id, task_hash=task.hash, task_name=PRETRAINING, spans=(span,))
        )
    return Group(task=task, trajectories=tuple(found))


TEXTS = texts((1, 2, 3, 0, 2), (3, 3, 1))


class Server:
    """Top-k answers of a teacher in process, as a server gives them."""

    def __init__(self, teacher):
        self.teacher = teacher

    def top_k(self, trajectories, k):
        class Answer:
            def __init__(self, top):
                self.ids_CK, self.logprobs_CK = top.ids, top.logprobs

        return [Answer(t) for t in self.teacher.top_k(trajectories, k)]

    def score(self, trajectories):
        return self.teacher.score(trajectories)


def signals():
    one = cases.teacher()
    two = {"a": cases.teacher(seed=3), "*": cases.teacher(seed=4)}
    served = ServedTeacher(Server(one), k=2)
    return {
        "reverse_kl": lambda: TeacherDistribution(one, "reverse_kl"),
        "forward_kl_sampled_divisor": lambda: TeacherDistribution(one, "forward_kl", divisor="sampled"),
        "hinton": lambda: TeacherDistribution(one, "forward_kl", alpha=0.5),
        "two_teachers": lambda: TeacherDistribution(two, "reverse_kl"),
        "served": lambda: TeacherDistribution(served, "reverse_kl", estimator="top_k_tail"),
        "sampled": lambda: SampledLogRatio(one),
        "minillm": lambda: MiniLLM(one),
    }


def draw(policy):
    ys = [replace(t, weight=1.0) for t in cases.every_completion(policy)[::7]]
    named = [replace(t, task_name="a" if i % 2 else "b") for i, t in enumerate(ys)]
    return cases.draw_of(named)


def with_texts(d: Draw, group=TEXTS) -> Draw:
    return replace(d, groups=(*d.groups, group))


@pytest.mark.parametrize("layout,max_tokens", [("packed", 2048), ("packed", 9), ("padded", 16)])
@pytest.mark.parametrize("name", list(signals()))
def test_the_step_is_the_sum_of_both_losses_steps(name, layout, max_tokens):
    policy = cases.student()
    make = signals()[name]
    plumbing = {"layout": layout, "max_tokens": max_tokens}
    own, own_metrics = cases.gradient(policy, make(), draw(policy))
    text, text_metrics = cases.gradient(policy, HardTargets(), Draw(groups=(TEXTS,), author="recorded"))
    both, metrics = cases.gradient(
        policy, WithPretraining(make(), coefficient=0.7), with_texts(draw(policy)), **plumbing
    )
    cases.same(both["table_VD"], own["table_VD"] + 0.7 * text["table_VD"])
    assert metrics["train/loss"] == pytest.approx(own_metrics["train/loss"] + 0.7 * text_metrics["train/loss"])
    assert metrics["distill/pretraining_nats_per_target"] == pytest.approx(text_metrics["train/loss"])
    shown = [n for n in own_metrics if n.startswith("distill/divergence")]
    assert shown and all(metrics[n] == pytest.approx(own_metrics[n]) for n in shown)


def test_several_updates_of_a_draw_add_up_to_one_divided_the_same_way():
    """A draw cut into two updates keeps the shares of both losses."""
    policy, signal = cases.student(), WithPretraining(TeacherDistribution(cases.teacher(), "reverse_kl"))
    trainer = cases.trainer_of(policy)
    targets = signal.prepare(with_texts(draw(policy)), score_student=trainer.score)
    whole = trainer.step(list(targets.rows), signal, cases.settings(), lr=0.0)["train/loss"]
    halves = [list(targets.rows[i::2]) for i in range(2)]
    sizes = [sum(r.count for r in h) for h in halves]
    losses = [trainer.step(h, signal, cases.settings(), lr=0.0)["train/loss"] for h in halves]
    mean = sum(n * x for n, x in zip(sizes, losses, strict=True)) / sum(sizes)
    assert mean == pytest.approx(whole, rel=1e-12)


def test_no_teacher_reads_the_texts():
    teacher = cases.teacher()
    policy = cases.student()
    signal = WithPretraining(TeacherDistribution(teacher, "reverse_kl"))
    cases.gradient(policy, signal, with_texts(draw(policy)))
    with_text = teacher.num_scored_tokens
    cases.gradient(policy, TeacherDistribution(teacher, "reverse_kl"), draw(policy))
    assert teacher.num_scored_tokens == 2 * with_text


def test_what_makes_no_sense_is_refused():
    teacher, policy = cases.teacher(), cases.student()
    with pytest.raises(ConfigError, match="positive, got 0"):
        WithPretraining(TeacherDistribution(teacher), coefficient=0)
    with pytest.raises(ConfigError, match="sequences"):
        WithPretraining(TeacherDistribution(teacher, divisor="sequences"))
    signal = WithPretraining(TeacherDistribution(teacher))
    with pytest.raises(DataError, match="no text"):
        cases.gradient(policy, signal, draw(policy))
    with pytest.raises(DataError, match="no other trajectory"):
        cases.gradient(policy, signal, Draw(groups=(TEXTS,)))


def test_gradients_stay_finite_where_a_teacher_rules_tokens_out():
    """What a teacher all but forbids must not leak into the texts' rows, where it is the text's own token."""
    teacher = cases.teacher()
    with torch.no_grad():
        teacher.policy.table_VD[1] = -1e4
    policy = cases.student()
    signal = WithPretraining(TeacherDistribution(teacher, "jsd", beta=0.5))
    grads, metrics = cases.gradient(policy, signal, with_texts(draw(policy)))
    assert torch.isfinite(grads["table_VD"]).all() and metrics["distill/pretraining_nats_per_target"] < 10
