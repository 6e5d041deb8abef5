"""A stored or served teacher: the live one's step where nothing was left out, and what cannot be asked of it."""

import distillation_cases as cases
import numpy as np
import pytest
import torch

from tutelage.data.logit_cache import TopK, write_logit_cache
from tutelage.errors import ConfigError, DataError
from tutelage.numerics import divergence as kl
from tutelage.policies.teachers import ServedTeacher
from tutelage.signals.distribution import TeacherDistribution


def cached(folder, teacher, draw, **kwargs):
    options = {"vocab_size": cases.V, "tokenizer": "", "k": cases.V, "precision": "float64", **kwargs}
    return write_logit_cache(folder, list(draw), teacher, **options)


def signal_of(teacher, divergence, **kwargs):
    return TeacherDistribution(teacher, divergence, divisor="sequences", **kwargs)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("layout,max_tokens", [("packed", 2048), ("padded", 11)])
def test_a_cache_of_the_whole_vocabulary_gives_the_live_teachers_step(tmp_path, divergence, layout, max_tokens):
    policy, teacher = cases.student(chunk_size=4), cases.teacher()
    draw = cases.draw_of(cases.every_completion(policy)[:9], on_policy=False)
    live, m = cases.gradient(policy, signal_of(teacher, divergence, alpha=0.2), draw)
    stored, n = cases.gradient(
        policy,
        signal_of(cached(tmp_path, teacher, draw), divergence, alpha=0.2),
        draw,
        layout=layout,
        max_tokens=max_tokens,
    )
    cases.same(stored["table_VD"], live["table_VD"], 1e-10)
    assert abs(m["train/loss"] - n["train/loss"]) < 1e-10


def test_a_cache_at_the_losss_temperature_gives_the_live_teachers_step(tmp_path):
    policy, teacher = cases.student(), cases.teacher()
    draw = cases.draw_of(cases.every_completion(policy)[:9], on_policy=False)
    cache = cached(tmp_path, teacher, draw, temperature=3.0)
    a, b = (cases.gradient(policy, signal_of(t, "jsd", temperature=3.0), draw)[0] for t in (teacher, cache))
    cases.same(a["table_VD"], b["table_VD"], 1e-10)
    with pytest.raises(ConfigError, match="at temperature 3 and the loss is at 1"):
        signal_of(cache, "jsd")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_live_cached_and_served_top_k_with_tail_are_one(tmp_path, divergence):
    policy, teacher = cases.student(), cases.teacher()
    draw = cases.draw_of(cases.every_completion(policy)[:9], on_policy=False)

    class Server:
        def top_k(self, trajectories, k):
            answers = teacher.top_k(trajectories, k)
            return [type("A", (), {"ids_CK": a.ids, "logprobs_CK": a.logprobs}) for a in answers]

    options = {"estimator": "top_k_tail", "top_k": 2}
    served = ServedTeacher(Server(), k=2)
    want = cases.gradient(policy, signal_of(teacher, divergence, **options), draw)[0]["table_VD"]
    for other in (cached(tmp_path, teacher, draw, k=2), served):
        got = cases.gradient(policy, signal_of(other, divergence, **options), draw)[0]["table_VD"]
        cases.same(got, want, 1e-10)


def test_the_evenly_spread_tail_is_what_the_loss_sees(tmp_path):
    policy, teacher = cases.student(), cases.teacher()
    ys = cases.every_completion(policy)[:9]
    draw = cases.draw_of(ys, on_policy=False)

    def exact(s, t):
        p = t.softmax(-1)
        top = p.topk(2, -1)
        even = ((1 - top.values.sum(-1, keepdim=True)) / (cases.V - 2)).expand_as(p)
        return kl.reverse_kl(s, even.scatter(-1, top.indices, top.values).log())

    got = cases.expected_gradient(policy, signal_of(cached(tmp_path, teacher, draw, k=2), "reverse_kl"), draw)
    cases.same(got, cases.exact_gradient(policy, teacher, exact, ys), 1e-9)


def test_two_caches_of_different_k_by_task(tmp_path):
    policy, one, two = cases.student(), cases.teacher(seed=5, name="one"), cases.teacher(seed=6, name="two")
    ys = cases.every_completion(policy)[:8]
    named = [cases.replace_name(y, "ab"[i % 2], str(i)) for i, y in enumerate(ys)]
    draw = cases.draw_of(named, on_policy=False)
    caches = {
        "a": cached(tmp_path / "a", one, draw, k=2),
        "b": cached(tmp_path / "b", two, draw, k=cases.V),
    }
    got = cases.expected_gradient(policy, signal_of(caches, "forward_kl"), draw)
    parts = [
        cases.expected_gradient(
            policy,
            signal_of(caches[n], "forward_kl"),
            cases.draw_of([y for y in named if y.task_name == n], on_policy=False),
        )
        for n in "ab"
    ]
    cases.same(got, sum(parts), 1e-10)


def test_a_trajectory_that_was_not_cached_is_refused(tmp_path):
    policy, teacher = cases.student(), cases.teacher()
    ys = cases.every_completion(policy)
    cache = cached(tmp_path, teacher, cases.draw_of(ys[:3], on_policy=False))
    with pytest.raises(DataError, match="not in the logit cache"):
        cases.gradient(policy, signal_of(cache, "forward_kl"), cases.draw_of(ys[3:5], on_policy=False))


class Served:
    form, name, is_lazy = "top_k", "served", False

    def __init__(self, k=2, n=3):
        self.k, self.n = k, n

    def top_k(self, trajectories):
        ids = np.tile(np.arange(self.k), (self.n, 1))
        return [TopK(ids, np.full(ids.shape, -2.0), np.full(self.n, -1.0)) for _ in trajectories]


def test_what_a_server_cannot_give_is_refused():
    with pytest.raises(ConfigError, match="not the whole vocabulary"):
        signal_of(Served(), "forward_kl")
    with pytest.raises(ConfigError, match="one token and a tail"):
        signal_of(Served(k=1), "reverse_kl", estimator="top_k_tail")
    with pytest.raises(ConfigError, match="all be in process or all"):
        signal_of({"a": Served(), "b": cases.teacher()}, "forward_kl", estimator="top_k_tail", top_k=2)
    draw = cases.draw_of([cases.trajectory((0, 1))], on_policy=False)
    with pytest.raises(DataError, match="answered for 3 targets of a trajectory that has 2"):
        signal_of(Served(), "forward_kl", estimator="top_k_tail").prepare(draw, score_student=None)


def test_a_servers_tail_is_what_its_answers_leave():
    answer = type("A", (), {"ids_CK": np.array([[4, 1]]), "logprobs_CK": np.log([[0.6, 0.3]])})
    scorer = type("S", (), {"top_k": lambda self, ts, k: [answer], "score": lambda self, ts: [[-1.0]]})()
    teacher = ServedTeacher(scorer, k=2)
    (got,) = teacher.top_k([None])
    assert got.tail.tolist() == pytest.approx([np.log(0.1)]) and teacher.score([None]) == [[-1.0]]
    answer.logprobs_CK = np.log([[0.7, 0.30000001]])
    assert np.isfinite(teacher.top_k([None])[0].tail).all()
    assert torch.tensor(teacher.top_k([None])[0].tail).item() < -15
