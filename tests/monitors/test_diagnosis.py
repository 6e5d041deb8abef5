"""The split of a task set on populations whose gap is known."""

import json

import numpy as np
import pytest

from tutelage.errors import DataError
from tutelage.monitors.diagnosis import LABELS, METHODS, DiagnosisSettings, PromptMeasures, cost_slope, diagnose

NEVER, SOMETIMES, ALWAYS = (64, 0), (64, 20), (64, 64)
GOOD, BAD = (16, 15), (32, 0)


def prompts(num, prefix="p", **measures):
    return [PromptMeasures(task_id=f"{prefix}{i}", **measures) for i in range(num)]


CASES = {
    "knowledge": dict(student=NEVER, teacher=GOOD, few_shot=BAD, kl_teacher_prefix=1.2, kl_student_prefix=1.5),
    "format": dict(student=NEVER, teacher=GOOD, few_shot=(16, 10)),
    "execution": dict(student=SOMETIMES, teacher=(64, 20)),
    "exposure": dict(
        student=SOMETIMES, teacher=GOOD, kl_teacher_prefix=0.05, kl_student_prefix=0.3, recovery=GOOD, cost_slope=1.9
    ),
    "exploration": dict(student=NEVER, teacher=BAD, few_shot=BAD),
    "saturated": dict(student=ALWAYS, teacher=(64, 64)),
    "unknown": dict(student=NEVER),
}


@pytest.mark.parametrize("label", LABELS)
def test_a_population_with_one_gap_is_placed_there(label):
    found = diagnose(prompts(40, **CASES[label]))
    assert found.shares[label].value > 0.9
    assert sum(e.value for e in found.shares.values()) == pytest.approx(1)
    assert max(found.shares, key=lambda name: found.shares[name].value) == label


def test_a_mixture_is_split_with_intervals_that_hold_the_truth():
    truth = {"knowledge": 30, "format": 10, "execution": 40, "exposure": 10, "saturated": 10}
    population = [p for name, num in truth.items() for p in prompts(num, prefix=name, **CASES[name])]
    found = diagnose(population)
    for name, num in truth.items():
        e = found.shares[name]
        assert e.value == pytest.approx(num / 100, abs=0.03)
        assert e.low < num / 100 < e.high
        assert 0.03 < e.half_width < 0.12  # 100 prompts
    assert found.shares["exploration"].high < 0.05
    assert [row[0] for row in found.rows()][:2] == ["execution", "knowledge"]
    assert found.rows()[0][3] == METHODS["execution"]
    assert "execution" in found.sentence() and found.sentence().count("%") == len(LABELS)


def test_share_intervals_cover_over_populations():
    hits = 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        kinds = rng.random(50) < 0.4
        population = [
            PromptMeasures(task_id=f"p{i}", **(CASES["knowledge"] if k else CASES["saturated"]))
            for i, k in enumerate(kinds)
        ]
        e = diagnose(population, DiagnosisSettings(resamples=300, seed=trial)).shares["knowledge"]
        hits += e.low <= 0.4 <= e.high
    assert hits >= 54


def test_clusters_are_split_apart():
    population = prompts(20, "a", cluster="algebra", **CASES["knowledge"])
    population += prompts(20, "b", cluster="sums", **CASES["saturated"])
    found = diagnose(population)
    assert found.clusters["algebra"]["knowledge"].value > 0.9
    assert found.clusters["sums"]["saturated"].value > 0.9
    assert found.shares["knowledge"].value == pytest.approx(0.5, abs=0.05)


# -- missing measurements lower what can be said ------------------------------------------------


def unknown(**measures):
    found = diagnose(prompts(30, **measures))
    return found.shares["unknown"].value, found.missing


def test_never_solved_without_an_elicitation_run_may_be_format():
    share, missing = unknown(student=NEVER, teacher=GOOD)
    assert share > 0.9 and missing["a few-shot or format-fixed run"] == 30


def test_never_solved_without_a_teacher_may_be_anything():
    share, missing = unknown(student=NEVER, few_shot=BAD)
    assert share > 0.9 and missing["samples of a teacher"] == 30


def test_a_much_better_teacher_without_kls_leaves_execution_or_exposure():
    share, missing = unknown(student=SOMETIMES, teacher=GOOD)
    assert share > 0.9 and missing == {"KL to the teacher on its own and on the student's prefixes": 30}


def test_few_samples_leave_never_uncertain():
    few = diagnose(prompts(30, **{**CASES["knowledge"], "student": (4, 0)}))
    many = diagnose(prompts(30, **CASES["knowledge"]))
    assert few.shares["knowledge"].value < 0.6 < 0.9 < many.shares["knowledge"].value
    assert "p0" in few.intervals and few.intervals["p0"].high > 0.3


def test_nothing_judged_is_unknown():
    share, missing = unknown(student=(0, 0), teacher=GOOD, few_shot=GOOD)
    assert share == 1 and missing == {"judged samples of the student": 30}


def test_measuring_more_never_raises_the_unknown_share():
    bare = dict(student=NEVER)
    shares = []
    for more in ({}, {"few_shot": BAD}, {"teacher": GOOD}):
        bare |= more
        shares.append(unknown(**bare)[0])
    assert shares[0] > 0.9 and shares[2] < 0.1
    assert shares == sorted(shares, reverse=True)


# -- single clauses -----------------------------------------------------------------------------


def share(label, **measures):
    return diagnose(prompts(20, **measures)).shares[label].value


def test_a_hint_that_helps_means_knowledge_even_without_a_teacher():
    assert share("knowledge", student=NEVER, few_shot=BAD, hint=GOOD) > 0.9


def test_format_fixed_is_elicitation_too_and_a_hint_is_not():
    assert share("format", student=NEVER, format_fixed=GOOD) > 0.9
    assert share("format", student=NEVER, hint=GOOD) < 0.05


def test_knowledge_is_not_claimed_where_the_student_follows_the_teacher():
    case = {**CASES["knowledge"], "kl_teacher_prefix": 0.02, "kl_student_prefix": 0.02}
    assert share("knowledge", **case) < 0.05 and share("unknown", **case) > 0.9


@pytest.mark.parametrize(
    "change",
    [{"kl_teacher_prefix": 0.5}, {"kl_student_prefix": 0.06}, {"recovery": BAD}, {"cost_slope": 1.0}],
)
def test_exposure_needs_every_sign_that_was_measured(change):
    case = {**CASES["exposure"], **change}
    assert share("exposure", **case) < 0.05 and share("execution", **case) > 0.9


def test_exposure_is_told_from_kls_alone():
    case = {k: v for k, v in CASES["exposure"].items() if k not in ("recovery", "cost_slope")}
    assert share("exposure", **case) > 0.9
    assert share("exposure", **{**case, "student": NEVER}) > 0.9


def test_json_and_refusals():
    body = diagnose(prompts(10, **CASES["format"])).to_json()
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert set(body["shares"]) == set(LABELS) and body["shares"]["format"]["method"] == METHODS["format"]
    with pytest.raises(DataError, match="got 2, 1 unique"):
        diagnose(prompts(1, student=NEVER) * 2)
    with pytest.raises(DataError, match="at least one prompt"):
        diagnose([])
    with pytest.raises(DataError, match=r"teacher of prompt 'x' .* got \(4, 5\)"):
        PromptMeasures(task_id="x", student=NEVER, teacher=(4, 5))


def test_same_seed_same_diagnosis():
    population = prompts(10, **CASES["execution"])
    assert diagnose(population) == diagnose(population)


@pytest.mark.parametrize(("power", "word"), [(2.0, "compound"), (1.0, "step by step")])
def test_cost_slope_reads_the_power(power, word):
    horizons = [5, 10, 20, 40, 80]
    noise = np.exp(np.random.default_rng(0).normal(0, 0.02, 5))
    slope = cost_slope(horizons, [0.01 * h**power * e for h, e in zip(horizons, noise, strict=True)])
    assert slope.low < power < slope.high and word in slope.reading


def test_cost_slope_refuses_too_little():
    with pytest.raises(DataError, match="got 2 and 2"):
        cost_slope([1, 2], [1, 2])
    with pytest.raises(DataError, match="smallest 0"):
        cost_slope([1, 2, 3], [1, 0, 2])
