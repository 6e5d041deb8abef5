"""Practised questions against the probe's: who is counted, the interval, and when the monitor speaks of it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from test_graduation import S, falling, probe, spread

from tutelage.monitors.graduation import GRADUATE, GraduationMonitor
from tutelage.monitors.practised import practised
from tutelage.types import Draw, DrawContext, Group, SamplingParams, Span, Status, Task, Trajectory, Verdict

PLAIN = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=4)


def answer(task: int, is_right: bool | None, *, version: str | None = "v1", params=PLAIN, exact=True) -> Trajectory:
    span = Span(
        token_ids=(1, 2),
        role="assistant",
        author="student",
        is_sampled=True,
        is_trainable=True,
        policy_version=version,
        sampling=params,
        is_context_exact=exact,
    )
    status = Status.ERROR if is_right is None else Status.ACCEPT if is_right else Status.REJECT
    prompt = Span(token_ids=(0,), role="user", author="user")
    return Trajectory(
        id=f"{task}", task_id=f"q{task}", task_hash="h", spans=(prompt, span), verdict=Verdict(status=status)
    )


def drawn(*answers: Trajectory) -> Draw:
    return Draw(groups=(Group(task=Task(id="q", messages=()), trajectories=answers),))


def draw_of(counts, n=8, **more) -> Draw:
    return drawn(*(answer(i, j < c, **more) for i, c in enumerate(counts) for j in range(n)))


def test_the_gap_and_its_interval_are_those_of_two_independent_means_over_questions():
    rng = np.random.default_rng(0)
    on_draw, on_probe = rng.integers(0, 9, 300), rng.integers(0, 17, 200)
    found = practised(draw_of(on_draw), [probe(0, on_probe.tolist(), version="v1", distinct=1)])
    a, b = on_draw / 8, on_probe / 16
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found is not None and found.tasks == 300 and found.gap == pytest.approx(a.mean() - b.mean())
    shown = found.to_json()["gap"]["ci95"]
    assert shown == pytest.approx([low, high], abs=0.001)  # Welch's t against a normal: many questions
    assert found.is_by_heart == (low > 0)


@pytest.mark.parametrize(
    "more",
    [{"version": "v0"}, {"version": None}, {"exact": False}, {"params": replace(PLAIN, temperature=0.7)}],
    ids=["older weights", "nobody's", "with a hint", "sharper"],
)
def test_only_samples_of_the_probed_weights_as_they_are_count(more):
    own = [answer(i, is_right) for i, is_right in enumerate((True, False, True, None))]
    others = [answer(i, True, **more) for i in range(50, 60)]
    p = probe(0, [8, 8, 8], version="v1")
    found = practised(drawn(*own, *others), [p])
    assert found is not None and found.tasks == 3 and found.draw == pytest.approx(2 / 3)  # an error is nobody's failure
    assert practised(drawn(*others), [p]) is None
    assert practised(drawn(own[0]), [p]) is None  # one question has no interval


def test_questions_count_alike_however_many_samples_they_have():
    one, many = [answer(0, True)], [answer(1, False) for _ in range(7)]
    found = practised(drawn(*one, *many), [probe(0, [8, 8], version="v1")])
    assert found is not None and found.draw == pytest.approx(0.5)


def test_a_probe_within_the_round_is_of_other_weights_and_is_passed_over():
    first, within = probe(0, [4] * 4, version="v1"), probe(5, [16] * 4, version="v2")
    found = practised(draw_of([8, 6, 7, 8]), [first, within])
    assert found is not None and found.probe == pytest.approx(0.25)


def test_the_monitor_says_what_is_known_by_heart_where_imitation_ends():
    hs = falling(7)
    probes = [probe(20 * i, spread(0.5 - 0.3 * (i == 0), seed=i), h=hs[i], version=f"v{i}") for i in range(7)]

    def watched(counts):
        todo = iter(probes)
        monitor = GraduationMonitor(S, probe=lambda _: next(todo))
        monitor.start(DrawContext(seed=0, stage=0, round=0))
        return [
            monitor.after_round(draw_of(counts, version=f"v{i}"), DrawContext(seed=0, stage=0, round=i))
            for i in range(6)
        ]

    by_heart, alike = watched([8] * 90 + [6] * 10), watched([8] * 50 + [0] * 50)
    assert [r.verdict for r in by_heart] == [r.verdict for r in alike] and by_heart[-1].verdict == GRADUATE
    assert by_heart[0].evidence["practised"]["is_by_heart"] and "not practised" not in by_heart[0].evidence["why"]
    assert "give RL questions that were not practised" in by_heart[-1].evidence["why"]
    assert by_heart[-1].evidence["practised"]["pass@1"] == pytest.approx(0.975)
    assert "not practised" not in alike[-1].evidence["why"] and not alike[-1].evidence["practised"]["is_by_heart"]


def test_the_monitor_compares_with_the_probe_before_the_round_also_where_one_came_within_it():
    todo = iter([probe(0, [4] * 4, version="v0"), probe(5, [16] * 4, version="v5"), probe(9, [8] * 4, version="v9")])
    monitor = GraduationMonitor(S, probe=lambda _: next(todo))
    ctx = DrawContext(seed=0, stage=0, round=0)
    monitor.start(ctx)
    assert monitor.probe_now(ctx).evidence["practised"] is None
    found = monitor.after_round(draw_of([6, 6, 6, 6], version="v0"), ctx).evidence["practised"]
    assert found["pass@1_of_probe"] == 0.25 and found["gap"]["value"] == 0.5
