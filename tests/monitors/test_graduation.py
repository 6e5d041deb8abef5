"""G1 to G9 on published curves and on histories with a known cause, the overall verdict, hysteresis, and resuming."""

import functools
import json
import math

import numpy as np
import pytest
from scipy import stats

from tutelage.errors import CheckpointError, DataError
from tutelage.monitors import criteria as c
from tutelage.monitors.criteria import FAIL, INSUFFICIENT, PASS, Criterion, GraduationSettings
from tutelage.monitors.entropy import EntropyStats
from tutelage.monitors.graduation import GraduationMonitor, graduation_rows, judge_criteria, settle
from tutelage.monitors.probe import Probe, TaskProbe
from tutelage.numerics.statistics import Estimate
from tutelage.types import Draw, DrawContext, content_hash

S = GraduationSettings()
SMALL = GraduationSettings(min_tasks=1, min_samples=1)

# Xiong et al. 2025 (arXiv:2504.11343), Qwen2.5-Math-7B, read off the released curves at steps 20, 40, ... 280.
STEPS = list(range(20, 281, 20))
RAFT_ACC = [43.4, 46.6, 48.6, 50.1, 50.8, 50.9, 51.4, 50.8, 51.4, 51.2, 51.5, 52.0, 52.7, 52.3]
RAFT_H = [0.18, 0.124, 0.10, 0.043, 0.02, 0.017, 0.018, 0.015, 0.014, 0.015, 0.013, 0.013, 0.014, 0.013]
GRPO_ACC = [42.4, 45.3, 47.6, 48.6, 49.7, 50.6, 50.8, 51.5, 52.1, 52.5, 52.4, 52.5, 53.5, 53.4]
GRPO_H = [0.21, 0.183, 0.17, 0.166, 0.163, 0.151, 0.137, 0.133, 0.12, 0.108, 0.101, 0.096, 0.09, 0.086]


def g1_at(entropies, step):
    return c.entropy_spent(entropies[: STEPS.index(step) + 1], S)


def g2_at(entropies, accuracies, step):
    m = STEPS.index(step) + 1
    return c.entropy_ceiling(entropies[:m], [a / 100 for a in accuracies[:m]], S)


# -- published curves, before hysteresis --------------------------------------------------------


def test_g1_ratio_crosses_at_step_80_of_raft_and_its_slope_clause_holds_from_140():
    crossed = [step for step in STEPS if g1_at(RAFT_H, step).value <= 0.25]
    assert crossed == STEPS[STEPS.index(80) :]
    assert [step for step in STEPS if g1_at(RAFT_H, step).verdict == PASS] == STEPS[STEPS.index(140) :]
    assert g1_at(RAFT_H, 100).value == pytest.approx(0.11, abs=0.005)
    assert "still moving" in g1_at(RAFT_H, 100).why


def test_g2_fires_at_step_100_of_raft_with_the_published_fit():
    assert [g2_at(RAFT_H, RAFT_ACC, step).verdict for step in (20, 40, 60, 80)] == [INSUFFICIENT] * 4
    g2 = g2_at(RAFT_H, RAFT_ACC, 100)
    assert g2.verdict == PASS
    assert g2.details["a"] == pytest.approx(0.415, abs=0.001)
    assert g2.details["b"] == pytest.approx(0.935, abs=0.001)
    assert g2.details["r2"] == pytest.approx(0.965, abs=0.001)
    assert g2.details["ceiling"] == pytest.approx(0.520, abs=0.001)
    assert g2.value == pytest.approx(0.0084, abs=0.0001)
    assert all(g2_at(RAFT_H, RAFT_ACC, step).verdict == PASS for step in STEPS[4:])


def test_neither_g1_nor_g2_fires_on_grpo_by_step_260():
    for step in STEPS[: STEPS.index(260) + 1]:
        assert g1_at(GRPO_H, step).verdict != PASS
        assert g2_at(GRPO_H, GRPO_ACC, step).verdict != PASS
    assert g1_at(GRPO_H, 260).value == pytest.approx(0.43, abs=0.005)
    assert g2_at(GRPO_H, GRPO_ACC, 100).value == pytest.approx(0.216, abs=0.002)


def test_g2_interval_is_the_t_interval_of_the_slope():
    g2 = g2_at(RAFT_H, RAFT_ACC, 100)
    x, y = np.exp(RAFT_H[:5]), np.array(RAFT_ACC[:5]) / 100
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    se = math.sqrt((residual**2).sum() / 3 / ((x - x.mean()) ** 2).sum())
    half = stats.t.ppf(0.975, 3) * se * (x[-1] - 1)
    assert g2.ci95 == (pytest.approx(g2.value - half), pytest.approx(g2.value + half))


def test_g2_threshold_is_never_finer_than_what_can_be_seen():
    wide = c.entropy_ceiling(GRPO_H[:5], [a / 100 for a in GRPO_ACC[:5]], S, half_width=0.3)
    assert wide.verdict == PASS and wide.threshold == 0.3


@pytest.mark.parametrize(
    ("entropies", "accuracies"),
    [
        ([0.5, 0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.1, 0.5, 0.2]),  # no relation
        ([0.5, 0.4, 0.3, 0.2, 0.1], [0.5, 0.4, 0.3, 0.2, 0.1]),  # accuracy falls with entropy
        ([0.5] * 5, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ([0.5, 0.4, 0.3, 0.2, 0.1], [0.3] * 5),
    ],
)
def test_g2_says_nothing_where_the_fit_means_nothing(entropies, accuracies):
    g2 = c.entropy_ceiling(entropies, accuracies, S)
    assert g2.verdict == INSUFFICIENT and g2.missing


def test_g1_says_what_it_lacks():
    assert c.entropy_spent([], S).missing == "token entropies from the sampler"
    assert c.entropy_spent([1.0, 0.1], S).missing == "3 probes for the slope, there are 2"
    assert c.entropy_spent([1.0], S).verdict == FAIL


# -- histories ----------------------------------------------------------------------------------


def entropy(value):
    return EntropyStats(
        token_mean=value,
        sequence_mean=value,
        p80=value,
        low_share=0.5,
        monte_carlo=value,
        gap=0.0,
        num_tokens=1000,
        num_sequences=100,
        num_unknown=0,
    )


def probe(step, counts, *, n=16, h=0.5, keys=None, distinct=None, **fields):
    """`counts`: accepted of n for each task. Solutions recur within 60 steps unless `keys` or `distinct` say."""
    tasks = []
    for i, accepted in enumerate(counts):
        own = (
            tuple(content_hash(step // 60, i, j) for j in range(accepted))
            if keys is None
            else tuple(keys[i][:accepted])
        )
        tasks.append(
            TaskProbe(
                task_id=f"t{i}",
                n=n,
                c=accepted,
                distinct=min(accepted, distinct) if distinct is not None else len(set(own)),
                keys=own,
                entropy_nats=h * 100,
                entropy_tokens=100,
                answer_entropy=0.3,
            )
        )
    fields = {"entropy": entropy(h), "seconds": 2.0, "tokens": 50} | fields
    return Probe(step=step, tasks=tuple(tasks), samples=n, **fields)


def spread(mean, num=160, seed=0, concentration=1.5):
    """Accepted counts of 16 with solve rates from a Beta of this mean."""
    rng = np.random.default_rng(seed)
    rates = np.random.default_rng(99).beta(mean * concentration, (1 - mean) * concentration, num)
    return rng.binomial(16, rates).tolist()


def falling(num, first=0.5, last=0.02):
    """Entropies that drop fast, then lie flat."""
    return [last + (first - last) * math.exp(-1.5 * i) for i in range(num)]


def flat_history(mean, num=7, seed=0):
    """pass@1 that climbs by 0.3 in the first probe, then stays; entropy that is spent by then."""
    hs = falling(num)
    return [probe(20 * i, spread(mean - 0.3 * (i == 0), seed=seed + i), h=hs[i]) for i in range(num)]


def run(history, settings=S):
    monitor = GraduationMonitor(settings)
    return monitor, [monitor.update(p) for p in history]


@functools.cache
def graduated():
    """(history, reports) of a run that plateaus; shared by tests that only read it."""
    history = flat_history(0.5, num=9)
    return history, run(history)[1]


def test_a_plateau_with_spent_entropy_and_headroom_graduates_and_stops():
    _, reports = graduated()
    assert reports[-1].verdict == "GRADUATE" and reports[-1].should_stop and not reports[-1].should_revert
    assert reports[0].verdict == "INSUFFICIENT" and not reports[0].should_stop
    evidence = reports[-1].evidence
    assert list(evidence["criteria"]) == ["G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8", "G9", "narrowing"]
    assert evidence["hand_over"]["step"] >= 120
    assert evidence["cost"] == {
        "probes": 9,
        "probe_seconds": 2.0,
        "probe_tokens": 50,
        "all_seconds": 18.0,
        "all_tokens": 450,
    }
    assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence
    assert len(graduation_rows(reports[-1])) == 10


def test_every_criterion_has_a_sentence_or_says_what_is_missing():
    for report in graduated()[1]:
        for name, body in report.evidence["criteria"].items():
            assert body["verdict"] in (PASS, FAIL, INSUFFICIENT)
            assert bool(body["missing"]) == (body["verdict"] == INSUFFICIENT), name
            assert body["why"] or body["missing"], name


def test_still_rising_is_not_a_plateau():
    means = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    _, reports = run([probe(20 * i, spread(m, seed=i), h=falling(6)[i]) for i, m in enumerate(means)])
    g3 = reports[-1].evidence["criteria"]["G3"]
    assert g3["verdict"] == FAIL and g3["value"] == pytest.approx(0.27, abs=0.05)
    assert reports[-1].verdict == "CONTINUE"


def test_g3_threshold_is_a_quarter_of_the_first_gain_or_a_point():
    history = flat_history(0.5, num=5)
    g3 = c.plateau(history, S)
    first = c.gain_between(history[0], history[1], 1).value
    assert g3.threshold == pytest.approx(0.25 * first) and first > 0.2
    assert c.plateau(history[1:], S).threshold >= 0.01
    same = [probe(i, [8] * 20) for i in range(4)]
    assert c.plateau(same, S).threshold == 0.01


def test_g3_says_how_many_prompts_would_tell():
    """The change is 0 on average and seven prompts are too few to see that it is under a point."""
    history = [probe(i, [8, 7, 9, 8, 6, 10, 8]) for i in range(3)] + [probe(3, [7, 8, 9, 9, 5, 11, 7])]
    g3 = c.plateau(history, S)
    assert g3.verdict == INSUFFICIENT and "about" in g3.missing and g3.missing.endswith("there are 7")
    half = g3.ci95[1] - g3.value
    assert int(g3.missing.split()[1]) == math.ceil(7 * (half / (0.01 - g3.value)) ** 2)


def test_no_headroom_asks_for_a_teacher():
    """Every prompt is solved always or never: flat, and nothing to sharpen."""
    counts = [16] * 40 + [0] * 120
    history = [probe(20 * i, [0] * 160 if i == 0 else counts, h=falling(8)[i]) for i in range(8)]
    _, reports = run(history)
    assert reports[-1].evidence["criteria"]["G4"]["verdict"] == FAIL
    assert reports[-1].verdict == "NEED_TEACHER" and reports[-1].should_stop


def test_g4_is_coverage_minus_pass_at_1():
    g4 = c.headroom([probe(0, [4, 0, 16, 8])], S)
    assert g4.value == pytest.approx(np.mean([1, 0, 1, 1]) - np.mean([0.25, 0, 1, 0.5]))
    assert g4.details["k"] == 16
    assert c.headroom([probe(0, [1], n=1)], S).verdict == INSUFFICIENT


def test_prompts_that_are_too_hard_are_to_be_fixed_before_rl():
    counts = [0] * 100 + [3] * 60
    history = [probe(20 * i, [0] * 160 if i == 0 else counts, h=falling(8)[i]) for i in range(8)]
    _, reports = run(history)
    g5 = reports[-1].evidence["criteria"]["G5"]
    assert g5["verdict"] == FAIL and g5["details"]["all_wrong"] > 0.5
    assert "all wrong" in g5["why"] and "knowledge gap" in g5["why"]
    assert reports[-1].verdict == "FIX_PROMPTS" and not reports[-1].should_stop


def test_g5_shares_are_those_of_groups_drawn_from_the_samples():
    g5 = c.group_signal([probe(0, [16, 0, 8, 1])], S)
    wrong = np.mean([0, 1, math.comb(8, 8) / math.comb(16, 8), math.comb(15, 8) / math.comb(16, 8)])
    right = np.mean([1, 0, math.comb(8, 8) / math.comb(16, 8), 0])
    assert g5.details["all_wrong"] == pytest.approx(wrong) and g5.details["all_right"] == pytest.approx(right)
    assert g5.value == pytest.approx(1 - wrong - right)
    assert c.group_signal([probe(0, [1], n=4)], S).verdict == INSUFFICIENT


def test_g5_expected_shares_follow_from_the_beta_binomial_fit():
    g5 = c.group_signal([probe(0, spread(0.3, num=600))], S)
    assert g5.details["expected_all_wrong"] == pytest.approx(g5.details["all_wrong"], abs=0.03)
    assert g5.details["expected_all_right"] == pytest.approx(g5.details["all_right"], abs=0.03)


def test_all_right_groups_call_for_new_prompts():
    g5 = c.group_signal([probe(0, [16] * 60 + [8] * 40)], S)
    assert g5.verdict == FAIL and "new prompts" in g5.why


# -- narrowing ----------------------------------------------------------------------------------


def test_falling_coverage_stops_even_while_pass_at_1_rises():
    wide, narrow = [4] * 160, [16] * 64 + [0] * 96
    history = [probe(20 * i, wide if i < 3 else narrow, h=falling(6)[i]) for i in range(6)]
    _, reports = run(history)
    rose = c.gain_between(history[0], history[-1], 1)
    assert rose.low > 0
    assert reports[3].evidence["verdict_now"] == "STOP_NARROWING" and reports[3].verdict != "STOP_NARROWING"
    assert reports[4].verdict == "STOP_NARROWING" and reports[4].should_stop
    assert "step 0" in reports[4].evidence["why"] or "step 40" in reports[4].evidence["why"]


def test_narrowing_is_decided_even_on_a_small_probe():
    history = [probe(20 * i, [4] * 40 if i < 3 else [16] * 10 + [0] * 30) for i in range(5)]
    assert run(history)[1][-1].verdict == "STOP_NARROWING"


def test_constant_coverage_seldom_looks_like_narrowing():
    false_alarms = 0
    rates = np.random.default_rng(1).beta(0.3, 1.5, 64)
    for trial in range(12):
        rng = np.random.default_rng(trial)
        history = [probe(i, rng.binomial(8, rates).tolist(), n=8) for i in range(8)]
        false_alarms += any(c.narrowing(history[: i + 1], S).verdict == PASS for i in range(1, 8))
    assert false_alarms <= 1


def test_narrowing_is_harder_to_claim_after_more_probes():
    history = [probe(i, [8] * 30) for i in range(5)]
    assert c.narrowing(history[:2], S).details["level"] == pytest.approx(0.95)
    assert c.narrowing(history, S).details["level"] == pytest.approx(1 - 0.05 / 4)
    assert c.narrowing(history[:1], S).verdict == INSUFFICIENT


# -- G6 to G9 -----------------------------------------------------------------------------------


def test_g6_novelty_is_against_everything_seen_before():
    first = [[f"a{j}" for j in range(16)] for _ in range(4)]
    second = [[f"a{j}" for j in range(8)] + [f"b{j}" for j in range(8)] for _ in range(4)]
    monitor, reports = run([probe(i, [16] * 4, keys=k) for i, k in enumerate([first, second, second, first])], SMALL)
    assert [r.evidence["novelty"] for r in reports] == [1.0, 0.5, 0.0, 0.0]
    g6 = reports[-1].evidence["criteria"]["G6"]
    assert g6["verdict"] == PASS and g6["details"]["duplicate_share"] == 0
    assert reports[2].evidence["criteria"]["G6"]["verdict"] == FAIL  # .5 and 0: not two in a row
    assert reports[1].evidence["criteria"]["G6"]["verdict"] == INSUFFICIENT
    assert all(t.keys == () for p in monitor.history for t in p.tasks)


def test_g6_counts_repeats_within_a_prompt():
    g6 = c.duplicates(probe(0, [8, 8], keys=[["a"] * 8, ["a", "b"] * 4]), [1.0, 0.0, 0.0], S)
    assert g6.details["duplicate_share"] == pytest.approx(1 - 3 / 16)
    assert c.duplicates(probe(0, [0, 0]), [None, None], S).details["duplicate_share"] is None


def test_g7_waits_for_the_temperature_cap():
    def history(cap):
        return [probe(i, [8] * 20, distinct=4, at_temperature_cap=cap) for i in range(3)]

    assert c.balance_flat(history(None), S).verdict == INSUFFICIENT
    assert c.balance_flat(history(True)[:2], S).verdict == INSUFFICIENT
    assert c.balance_flat(history(False), S).verdict == FAIL
    g7 = c.balance_flat(history(True), S)
    assert g7.verdict == PASS and g7.details["balance"]["value"] == pytest.approx(4 / 8 * 4 / 8)
    moving = [probe(i, [8] * 20, distinct=2 + 2 * i, at_temperature_cap=True) for i in range(3)]
    assert c.balance_flat(moving, S).verdict == FAIL
    for cap, probes in ((None, 3), (True, 2), (False, 3), (True, 3)):  # undecided or not: of one quantity
        undecided = [probe(i, [8] * 20, distinct=2 + 2 * i, at_temperature_cap=cap) for i in range(probes)]
        g7 = c.balance_flat(undecided, S)
        change = ((2 * probes) ** 2 - 2**2) / 64
        assert g7.value == pytest.approx(change) and g7.threshold == 0.0
        assert g7.ci95[0] <= g7.value <= g7.ci95[1]


def nll(value):
    return Estimate(value=value, low=value - 0.1, high=value + 0.1, count=10, method="percentile")


def test_g8_prefers_held_out_nll_then_coverage_never_pass_at_1():
    sharp, wide = [16] * 10 + [0] * 10, [2] * 20
    history = [probe(0, wide), probe(20, sharp), probe(40, sharp)]
    assert c.hand_over(history, S).details["step"] == 0  # the sharp ones have the higher pass@1
    assert c.hand_over(history, S).details["by"] == "highest pass@16"
    scored = [probe(20 * i, wide, heldout_nll=nll(v), checkpoint=f"c{i}") for i, v in enumerate([0.1, 2.0, 1.0, 1.5])]
    chosen = c.hand_over(scored, S)
    assert chosen.details == {"step": 40, "checkpoint": "c2", "version": "", "by": "lowest held-out NLL"}
    assert chosen.value == 1.0


def test_g9_fails_on_a_measured_loss_or_beyond_the_limit():
    def e(value, half):
        return Estimate(value=value, low=value - half, high=value + half, count=50, method="bca")

    def at(**fields):
        return [probe(0, [8], **fields)]

    assert c.drift(at(), S).verdict == INSUFFICIENT
    assert c.drift(at(retention={"code": e(-0.02, 0.05)}), S).verdict == PASS
    lost = c.drift(at(retention={"code": e(-0.08, 0.05), "chat": e(0.0, 0.1)}, kl_forward=nll(0.4)), S)
    assert lost.verdict == FAIL and lost.details["lost"] == ["code"] and "forward KL 0.4000" in lost.why
    limit = GraduationSettings(max_forward_kl=0.3)
    assert c.drift(at(kl_forward=nll(0.4)), limit).verdict == FAIL
    assert c.drift(at(kl_forward=nll(0.2)), limit).verdict == PASS
    assert c.drift(at(kl_forward=nll(0.4)), S).verdict == INSUFFICIENT


def test_entropy_ratio_interval_pairs_prompts_and_holds_the_value():
    rng = np.random.default_rng(0)

    def at(step, scale):
        tasks = tuple(
            TaskProbe(task_id=f"t{i}", n=1, c=0, entropy_nats=float(h * scale), entropy_tokens=100)
            for i, h in enumerate(base)
        )
        return Probe(step=step, tasks=tasks, samples=1)

    base = rng.gamma(1.0, 50.0, 100)
    ratio = c.entropy_ratio(at(0, 1.0), at(1, 0.5))
    assert ratio.value == pytest.approx(0.5)
    assert ratio.half_width < 1e-9  # prompts differ much, their ratio not at all
    assert c.entropy_ratio(at(0, 0.0), at(1, 1.0)) is None


# -- overall ------------------------------------------------------------------------------------


def crit(**verdicts):
    out = {}
    for name in ("G1", "G2", "G3", "G4", "G5", "narrowing"):
        verdict = verdicts.get(name, FAIL if name == "narrowing" else PASS)
        missing = f"more for {name}" if verdict == INSUFFICIENT else ""
        out[name] = Criterion(name=name, title=name, verdict=verdict, why=f"because {name}", missing=missing)
    return out


P, F, X = PASS, FAIL, INSUFFICIENT


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({}, "GRADUATE"),
        ({"G1": F}, "GRADUATE"),
        ({"G2": X}, "GRADUATE"),
        ({"G1": X, "G2": P}, "GRADUATE"),
        ({"G1": F, "G2": F}, "CONTINUE"),
        ({"G1": F, "G2": X}, "INSUFFICIENT"),
        ({"G3": F}, "CONTINUE"),
        ({"G3": X}, "INSUFFICIENT"),
        ({"G3": X, "G1": F, "G2": F}, "CONTINUE"),
        ({"G4": F}, "NEED_TEACHER"),
        ({"G4": F, "G3": F}, "CONTINUE"),
        ({"G4": F, "G3": X}, "CONTINUE"),
        ({"G5": F}, "FIX_PROMPTS"),
        ({"G5": F, "G3": F}, "FIX_PROMPTS"),
        ({"G5": F, "G4": X}, "CONTINUE"),
        ({"G4": X}, "INSUFFICIENT"),
        ({"narrowing": P}, "STOP_NARROWING"),
        ({"narrowing": P, "G3": F}, "STOP_NARROWING"),
        ({"narrowing": X}, "GRADUATE"),
    ],
)
def test_the_overall_verdict_follows_the_table(verdicts, expected):
    assert judge_criteria(crit(**verdicts)).verdict == expected


def test_insufficient_names_only_what_would_decide():
    judged = judge_criteria(crit(G1=F, G2=X, G5=X))
    assert judged.missing == ("G2 needs more for G2", "G5 needs more for G5")


def test_a_small_probe_set_is_named():
    _, reports = run([probe(0, [8] * 40, n=8)])
    assert reports[0].verdict == "INSUFFICIENT"
    assert reports[0].evidence["missing"] == [
        "128 probe prompts with judged samples, there are 40",
        "16 samples a prompt, there are 8",
    ]


def test_fixing_prompts_says_when_imitation_still_gains():
    assert "still gaining" in judge_criteria(crit(G5=F, G3=F)).why
    assert "still gaining" not in judge_criteria(crit(G5=F)).why


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["GRADUATE"], "CONTINUE"),
        (["GRADUATE", "GRADUATE"], "GRADUATE"),
        (["GRADUATE", "CONTINUE", "GRADUATE"], "GRADUATE"),
        (["GRADUATE", "GRADUATE", "CONTINUE"], "GRADUATE"),
        (["GRADUATE", "GRADUATE", "CONTINUE", "CONTINUE"], "CONTINUE"),
        (["GRADUATE", "STOP_NARROWING", "STOP_NARROWING"], "STOP_NARROWING"),
        (["GRADUATE", "STOP_NARROWING", "NEED_TEACHER"], "CONTINUE"),
        (["INSUFFICIENT"], "INSUFFICIENT"),
        (["INSUFFICIENT", "INSUFFICIENT", "CONTINUE"], "CONTINUE"),
        ([], "CONTINUE"),
    ],
)
def test_hysteresis_is_two_of_the_last_three(verdicts, expected):
    assert settle(verdicts, S) == expected


# -- the monitor --------------------------------------------------------------------------------


def test_a_resumed_monitor_says_what_an_uninterrupted_one_says():
    history, whole = graduated()
    first, _ = run(history[:4])
    second = GraduationMonitor(S)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert second.start(DrawContext(seed=0, stage=0, round=0)) is None
    assert [second.update(p) for p in history[4:]] == whole[4:]
    with pytest.raises(CheckpointError, match=r"\['fresh', 'novelties'\]"):
        second.restore({"history": [], "verdicts": []})


def test_a_run_that_went_back_forgets_the_probes_it_took_back():
    history, straight = graduated()
    monitor, _ = run(history[:4])
    monitor.update(probe(80, [16] * 160, h=0.001))
    report = monitor.update(history[4])
    assert report == straight[4]
    assert monitor.update(history[5]) == straight[5]


def test_the_probe_set_is_fixed():
    monitor, _ = run([probe(0, [8] * 4)])
    with pytest.raises(DataError, match=r"4 tasks since step 0\); the probe at step 20 has 5 tasks, 1 of them new"):
        monitor.update(probe(20, [8] * 5))


@pytest.mark.parametrize("fields", [{"temperature": 0.8}, {"top_p": 0.95}, {"is_accepted_only": True}])
def test_a_probe_of_anything_but_the_policy_itself_is_refused(fields):
    with pytest.raises(DataError, match="temperature 1 and top-p 1"):
        probe(0, [8], **fields)


def test_rounds_and_steps_decide_when_to_probe():
    made = []

    def make(ctx):
        made.append(ctx.round)
        return probe(20 * len(made), [8] * 4)

    monitor = GraduationMonitor(SMALL, probe=make, every_steps=50)
    monitor.start(DrawContext(seed=0, stage=0, round=0))
    assert [step for step in (20, 40, 69, 70, 80) if monitor.due(step)] == [70, 80]
    monitor.after_round(Draw(groups=()), DrawContext(seed=0, stage=0, round=3))
    assert made == [0, 3]
    assert not GraduationMonitor(SMALL).due(100)
    with pytest.raises(DataError, match="probe=Prober"):
        GraduationMonitor().after_round(Draw(groups=()), DrawContext(seed=0, stage=0, round=0))


def test_probes_without_entropies_leave_g1_and_g2_open():
    history = [probe(20 * i, spread(0.5, seed=i), entropy=None) for i in range(6)]
    _, reports = run(history)
    found = reports[-1].evidence["criteria"]
    assert found["G1"]["verdict"] == found["G2"]["verdict"] == INSUFFICIENT
    assert reports[-1].evidence["entropy_nats"] is None


def test_probe_json_round_trip():
    p = probe(
        3, [4, 0], kl_forward=nll(0.2), retention={"code": nll(0.1)}, heldout_nll=nll(1.0), at_temperature_cap=True
    )
    assert Probe.from_json(json.loads(json.dumps(p.to_json()))) == p
    assert Probe.from_json(probe(0, [1], entropy=None).to_json()).entropy is None
