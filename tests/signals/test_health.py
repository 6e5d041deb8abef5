"""Health while distilling: overlap with any kind of teacher, over all of a microbatch, and from samples alone."""

import distillation_cases as cases
import pytest
import torch

from tutelage.data.logit_cache import write_logit_cache
from tutelage.policies.teachers import ServedTeacher
from tutelage.signals.distribution import TeacherDistribution
from tutelage.signals.health import Health
from tutelage.signals.sampled import SampledLogRatio

V = 50


def logits(count, seed):
    return 2 * torch.randn(count, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compared(student, teacher, *, k, chunk=1000):
    """Sums of whole distributions and of the teacher's top k, in chunks."""
    whole, top = Health(["t"], overlap_k=4), Health(["t"], overlap_k=4)
    for health in (whole, top):
        health.begin_microbatch(len(student))
    for s, t in zip(student.split(chunk), teacher.split(chunk), strict=True):
        whole.compare(s, t)
        values, ids = t.log_softmax(-1).topk(k)
        shuffled = torch.randperm(k, generator=torch.Generator().manual_seed(1))
        top.compare_top_k(s, ids[:, shuffled], values[:, shuffled])
    return whole.take_sums(), top.take_sums()


def test_a_teachers_top_k_gives_the_overlap_of_its_whole_distribution():
    student, teacher = logits(64, 0), logits(64, 0) + logits(64, 1)
    whole, top = compared(student, teacher, k=V)
    assert whole == pytest.approx(top, abs=1e-9) and 0 < whole["overlap/2"] < 64
    whole, top = compared(student, teacher, k=12)
    for part in ("overlap/0", "overlap/2", "overlap/3"):  # the student's mass and the shared tokens are known
        assert whole[part] == pytest.approx(top[part], abs=1e-9)
    tail = (1 - teacher.softmax(-1).topk(12).values.sum(-1)).sum().item()
    assert whole["overlap/1"] - tail <= top["overlap/1"] < whole["overlap/1"]


def test_absent_entries_and_rows_that_nobody_answered_are_left_out():
    student = logits(3, 0)
    ids, logprobs = torch.zeros(3, 4, dtype=torch.int64), torch.full((3, 4), -torch.inf, dtype=torch.float64)
    ids[0, :2], logprobs[0, :2] = torch.tensor([7, 0]), torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    health = Health(["t"], overlap_k=4)
    health.begin_microbatch(3)
    health.compare_top_k(student, ids, logprobs)
    sums = health.take_sums()
    assert sums["overlap/3"] == 1
    assert sums["overlap/0"] == pytest.approx(student[0].softmax(-1)[[7, 0]].sum().item(), abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_compared_targets_are_spread_over_the_microbatch_however_it_is_cut(chunk):
    """The first half is alike, the second is not: half of the mass is shared."""
    student = logits(400, 0)
    teacher = torch.cat([student[:200], -10 * student[200:]])
    for sums in compared(student, teacher, k=V, chunk=chunk):
        assert sums["overlap/3"] == 58  # every 7th
        assert sums["overlap/2"] / sums["overlap/3"] == pytest.approx(0.5, abs=0.02)


def test_the_mass_that_two_distributions_share_is_estimated_from_samples():
    student, teacher = (logits(1, seed)[0].log_softmax(-1) for seed in (0, 1))
    health = Health(["t"], overlap_k=0)
    health.share(teacher - student, student.exp())  # every token, with the probability that it is sampled
    want = torch.minimum(student.exp(), teacher.exp()).sum().item()
    assert health.metrics(health.take_sums())["distill/mass_shared"] == pytest.approx(want, abs=1e-12)


class Server:
    def __init__(self, teacher):
        self.teacher = teacher

    def top_k(self, trajectories, k):
        answers = self.teacher.top_k(trajectories, k)
        return [type("A", (), {"ids_CK": a.ids, "logprobs_CK": a.logprobs}) for a in answers]


@pytest.mark.parametrize("form", ["live", "cache", "server"])
def test_every_form_of_teacher_reports_its_overlap(tmp_path, form):
    policy, teacher = cases.student(), cases.teacher()
    draw = cases.draw_of(cases.every_completion(policy)[:9], on_policy=False)
    if form == "cache":
        who = write_logit_cache(tmp_path, list(draw), teacher, vocab_size=4, tokenizer="", k=3, precision="float64")
    else:
        who = teacher if form == "live" else ServedTeacher(Server(teacher), k=3)
    signal = TeacherDistribution(who, "reverse_kl", estimator="top_k_tail", top_k=3 if form == "live" else None)
    _, found = cases.gradient(policy, signal, draw)
    k = 16 if form == "live" else 3  # what is compared, at most what the teacher gives
    shared = found[f"distill/frac_top{k}_shared"]
    assert 0 < shared <= 1 and 0 < found[f"distill/student_mass_on_teacher_top{k}"] <= 1


def test_a_sampled_log_ratio_reports_the_mass_shared_on_its_tokens():
    policy, teacher = cases.student(), cases.teacher()
    ys = cases.every_completion(policy)[:9]
    signal = SampledLogRatio(teacher)
    _, found = cases.gradient(policy, signal, cases.draw_of(ys))
    student, scores = [cases.shaped_logprobs(policy, y.spans[-1].token_ids) for y in ys], teacher.score(ys)
    ratio = [
        min(1.0, torch.tensor(p - q).exp().item())
        for a, b in zip(student, scores, strict=True)
        for q, p in zip(a, b, strict=True)
    ]
    assert found["distill/mass_shared"] == pytest.approx(sum(ratio) / len(ratio), abs=1e-9)
