"""The regression gate: what is taken back, what is not, and how it is said."""

import json

import numpy as np
import pytest

from tutelage.errors import CheckpointError, DataError
from tutelage.monitors.probe import Probe, TaskProbe
from tutelage.monitors.regression import RegressionGate, RegressionSettings
from tutelage.types import Draw, DrawContext


def probe(step, rate, *, num=100, n=16, seed=None):
    rng = np.random.default_rng(step if seed is None else seed)
    counts = rng.binomial(n, rate, size=num).tolist()
    return Probe(step=step, samples=n, tasks=tuple(TaskProbe(task_id=f"t{i}", n=n, c=c) for i, c in enumerate(counts)))


def run(*probes, settings=None):
    gate = RegressionGate(settings)
    return gate, [gate.update(p) for p in probes]


def test_a_round_that_lost_beyond_chance_is_taken_back():
    _, (base, good, bad) = run(probe(0, 0.3), probe(20, 0.5), probe(40, 0.4))
    assert (base.verdict, base.evidence["gated"]) == ("CONTINUE", False)
    assert good.verdict == "CONTINUE" and good.evidence["gains"]["base"]["value"] == pytest.approx(0.2, abs=0.04)
    assert bad.verdict == "REGRESSED" and bad.should_revert and not bad.should_stop
    assert bad.evidence["lost_against"] == ["round before"]
    assert bad.evidence["gains"]["round before"]["ci95"][1] < 0
    assert bad.evidence["revert_to_step"] == 20
    assert "pass@1 -1" in bad.evidence["why"] and "back to step 20" in bad.evidence["why"]


def test_a_loss_within_chance_is_kept():
    _, reports = run(probe(0, 0.3, num=20, n=4), probe(20, 0.5, num=20, n=4), probe(40, 0.45, num=20, n=4))
    assert reports[-1].verdict == "CONTINUE" and not reports[-1].should_revert


def test_the_round_before_is_the_one_kept_not_the_one_taken_back():
    """0.5, then 0.3 is taken back; 0.4 is better than 0.3 and still worse than the 0.5 in use."""
    _, reports = run(probe(0, 0.2), probe(20, 0.5), probe(40, 0.3), probe(60, 0.4))
    assert [r.verdict for r in reports[2:]] == ["REGRESSED", "REGRESSED"]
    assert reports[3].should_stop and reports[3].should_revert
    assert reports[3].evidence["revert_to_step"] == 20
    assert "2 rounds in a row" in reports[3].evidence["why"]


def test_a_good_round_in_between_starts_the_count_again():
    _, reports = run(probe(0, 0.2), probe(20, 0.5), probe(40, 0.3), probe(60, 0.6), probe(80, 0.4))
    assert [r.verdict for r in reports] == ["CONTINUE", "CONTINUE", "REGRESSED", "CONTINUE", "REGRESSED"]
    assert not reports[-1].should_stop and reports[-1].evidence["regressed_in_a_row"] == 1


def test_a_slow_slide_below_base_is_caught_against_base():
    """Each round loses 0.75 of 32 a prompt, less than the noise shows; against base the losses add up."""
    gate, reports = RegressionGate(), []
    for i in range(6):
        noise = np.random.default_rng(i).integers(-6, 7, size=60)
        counts = np.rint(20 - 0.75 * i + noise).astype(int).tolist()
        tasks = tuple(TaskProbe(task_id=f"t{j}", n=32, c=c) for j, c in enumerate(counts))
        reports.append(gate.update(Probe(step=10 * i, samples=32, tasks=tasks)))
    lost = [r.evidence.get("lost_against") for r in reports]
    assert ["base"] in lost
    assert lost.index(["base"]) >= 2


@pytest.mark.parametrize(("steps", "verdict"), [(1, "CONTINUE"), (2, "REGRESSED")])
def test_rounds_of_one_step_are_not_gated(steps, verdict):
    _, reports = run(probe(0, 0.6), probe(steps, 0.3))
    assert reports[1].verdict == verdict
    assert reports[1].evidence["gated"] == (steps > 1)
    if steps == 1:
        assert "a round of 1 optimiser step is not gated" in reports[1].evidence["why"]


def test_a_round_of_one_step_after_one_that_was_taken_back_is_not_gated():
    """The updates of the round taken back are no updates of the next."""
    gate, reports = run(probe(0, 0.6), probe(20, 0.3), probe(21, 0.3))
    assert [r.verdict for r in reports[1:]] == ["REGRESSED", "CONTINUE"] and not reports[2].evidence["gated"]
    again = gate.update(probe(41, 0.1))
    assert again.verdict == "REGRESSED" and again.evidence["revert_to_step"] == 21


def test_a_round_that_cannot_be_compared_says_so_and_is_not_a_reference():
    blind = Probe(step=40, samples=16, tasks=tuple(TaskProbe(task_id=f"t{i}", n=0, c=0, errors=16) for i in range(100)))
    _, reports = run(probe(0, 0.2), probe(20, 0.5), blind, probe(60, 0.3))
    assert reports[2].verdict == "INSUFFICIENT" and not reports[2].should_revert
    assert reports[3].verdict == "REGRESSED" and reports[3].evidence["lost_against"] == ["round before"]
    assert reports[3].evidence["revert_to_step"] == 40  # compared with 20; the round began with the weights of 40
    assert "back to step 40" in reports[3].evidence["why"]


def test_other_tasks_are_refused():
    gate, _ = run(probe(0, 0.2))
    with pytest.raises(DataError, match=r"base \(100 tasks\), got 90 tasks at step 20"):
        gate.update(probe(20, 0.2, num=90))


def test_coverage_can_be_gated_instead():
    _, reports = run(probe(0, 0.1), probe(20, 0.02), settings=RegressionSettings(k=8))
    assert reports[1].verdict == "REGRESSED" and "pass@8" in reports[1].evidence["why"]


def test_a_resumed_gate_goes_on():
    probes = [probe(0, 0.2), probe(20, 0.5), probe(40, 0.3), probe(60, 0.4)]
    _, whole = run(*probes)
    first, _ = run(*probes[:3])
    second = RegressionGate()
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert second.update(probes[3]) == whole[3]
    assert second.start(DrawContext(seed=0, stage=0, round=0)) is None
    with pytest.raises(CheckpointError, match=r"\['kept', 'last_step', 'regressed_in_a_row', 'start_step'\]"):
        second.restore({"base": None})
    empty = RegressionGate()
    empty.restore(RegressionGate().state())
    assert empty.update(probes[0]).evidence["gated"] is False


def test_the_gate_probes_through_the_context():
    seen = []

    def make(ctx):
        seen.append(ctx.round)
        return probe(20 * len(seen), 0.4)

    gate = RegressionGate(probe=make)
    ctx = DrawContext(seed=0, stage=0, round=0)
    assert gate.start(ctx).verdict == "CONTINUE"
    assert gate.after_round(Draw(groups=()), ctx).evidence["gated"]
    assert seen == [0, 0]
    with pytest.raises(DataError, match="probe=Prober"):
        RegressionGate().after_round(Draw(groups=()), ctx)
