"""The teacher check: the numbers it reports, and that it stops a run whose teacher has nothing to teach."""

import json
import math

import pytest
import torch

from tutelage.errors import ConfigError
from tutelage.evals.passk import TaskCounts
from tutelage.evals.result import EvalResult
from tutelage.evals.teacher_check import PrefixComparison, check_teacher, compare_prefixes, excess_error
from tutelage.monitors.entropy import EntropyStats
from tutelage.numerics.divergence import forward_kl, reverse_kl
from tutelage.policies.table import TablePolicy
from tutelage.policies.teachers import InProcessTeacher
from tutelage.types import Span, Trajectory

V = 6


def result(solved, n=4):
    counts = tuple(TaskCounts(task_id=f"q{i}", name="a", n=n, c=c) for i, c in enumerate(solved))
    names = EntropyStats.__dataclass_fields__
    entropy = EntropyStats.from_json({n: 0 if n.startswith("num") else None for n in names})
    return EvalResult(
        counts=counts,
        ks=(1,),
        seed=0,
        sampling={},
        entropy=entropy,
        mean_tokens=1.0,
        truncated_share=0.0,
        num_samples=n * len(counts),
        num_tokens=1,
    )


def trajectory(ids):
    spans = (
        Span(token_ids=(0,), role="user", author="user"),
        Span(token_ids=tuple(ids), role="assistant", author="student", is_sampled=True, is_trainable=True),
    )
    return Trajectory(id="t", task_id="q", task_hash="q", spans=spans)


def models():
    return InProcessTeacher(TablePolicy(V, seed=1)), InProcessTeacher(TablePolicy(V, seed=2))


def test_divergences_and_overlap_at_given_prefixes():
    student, teacher = models()
    ts = [trajectory((1, 2, 3)), trajectory((4, 5))]
    got = compare_prefixes(student, teacher, ts, top_k=2)
    fkl, rkl, mass = [], [], []
    for t in ts:
        tokens = torch.tensor([t.token_ids])
        s, p = (m.policy.logits(tokens)[0, :-1].detach() for m in (student, teacher))
        fkl.append(forward_kl(s, p))
        rkl.append(reverse_kl(s, p))
        mass.append(s.softmax(-1).gather(-1, p.topk(2).indices).sum(-1))
    assert got.num_tokens == 5
    assert got.forward_kl == pytest.approx(torch.cat(fkl).mean().item(), abs=1e-12)
    assert got.reverse_kl == pytest.approx(torch.cat(rkl).mean().item(), abs=1e-12)
    assert got.student_mass_on_teacher_top_k == pytest.approx(torch.cat(mass).mean().item(), abs=1e-12)
    assert got.forward_kl_by_position[0] == pytest.approx((fkl[0][0] + fkl[1][0]).item() / 2, abs=1e-12)
    assert got.count_by_position == (2, 2, 1)
    same = compare_prefixes(student, student, ts, top_k=2)
    assert abs(same.forward_kl) < 1e-12 and same.frac_top_k_shared == 1.0
    assert compare_prefixes(student, teacher, []) is None


def test_the_teacher_is_compared_as_it_is_used():
    student, teacher = models()
    hinted = [trajectory((1, 2))]
    view = [
        Trajectory(
            **{
                **hinted[0].__dict__,
                "spans": (Span(token_ids=(5, 3), role="system", author="user"), hinted[0].spans[1]),
            }
        )
    ]
    plain, seen = (compare_prefixes(student, teacher, hinted, views=v) for v in (None, view))
    assert plain.forward_kl_by_position[0] != seen.forward_kl_by_position[0]
    assert plain.forward_kl_by_position[1] == seen.forward_kl_by_position[1]


def prefixes(*nats):
    return PrefixComparison(
        num_tokens=1,
        forward_kl=0,
        reverse_kl=0,
        student_mass_on_teacher_top_k=0,
        teacher_mass_on_student_top_k=0,
        frac_top_k_shared=0,
        top_k=1,
        forward_kl_by_position=nats,
        count_by_position=(1,) * len(nats),
    )


def test_excess_error_is_the_published_ratio():
    got = excess_error(prefixes(0.1, 0.1, 0.1, 0.1), prefixes(0.1, 0.2, 0.3, 0.4))
    assert got == (pytest.approx((1, 0.0)), pytest.approx((2, 50.0)), pytest.approx((4, 150.0)))
    assert excess_error(prefixes(0.1, 0.2), prefixes(0.1, 0.2)) == ((1, pytest.approx(0)), (2, pytest.approx(0)))


def test_a_teacher_that_is_not_better_stops_the_run_with_the_numbers():
    good, bad = result([4, 3, 4, 2]), result([1, 0, 2, 1])
    report = check_teacher(None, None, student_result=bad, teacher_result=good)
    assert report.gain.gain.value == pytest.approx(13 / 16 - 4 / 16) and "The teacher is better" in report.verdict
    for student, teacher in ((good, bad), (good, good)):
        with pytest.raises(ConfigError, match=r"not better.*pass@1 is 0\.\d+ and the student's 0\.812.*95% interval"):
            check_teacher(None, None, student_result=student, teacher_result=teacher)
    allowed = check_teacher(None, None, student_result=good, teacher_result=bad, allow_worse=True)
    assert "not better" in allowed.verdict
    with pytest.raises(ConfigError, match="evaluate both"):
        check_teacher(None, None, student_result=good, teacher_result=None)


def test_an_average_of_the_students_weights_is_exempt_visibly():
    report = check_teacher(None, None, student_result=result([2]), teacher_result=result([2]), is_exempt=True)
    assert report.is_exempt and "exempt" in report.verdict and report.to_json()["is_exempt"] is True


def test_the_report_has_everything_and_is_json():
    student, teacher = models()
    report = check_teacher(
        student,
        teacher,
        student_result=result([1, 1]),
        teacher_result=result([4, 4]),
        teacher_trajectories=[trajectory((1, 2, 3, 4))],
        student_trajectories=[trajectory((4, 3, 2, 1))],
        top_k=3,
    )
    body = json.loads(json.dumps(report.to_json()))
    assert body["pass@1"]["teacher"]["value"] == 1.0 and len(body["pass@1"]["student"]["ci95"]) == 2
    assert body["on_teacher_prefixes"]["top_k"] == 3 and math.isfinite(body["on_student_prefixes"]["forward_kl"])
    assert [length for length, _ in body["excess_error_percent"]] == [1, 2, 4]
