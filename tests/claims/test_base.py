"""Claims as a framework: verdicts follow from intervals, results survive a round trip, the page is what is stored."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tutelage.claims import results as stored
from tutelage.claims.base import (
    FAILS,
    HOLDS,
    INCONCLUSIVE,
    Claim,
    Prediction,
    Predictions,
    combine,
    log_slope,
    over_seeds,
    t_interval,
)
from tutelage.claims.registry import CLAIMS, load, load_all
from tutelage.errors import ConfigError, DataError

DOCS = Path(__file__).parents[2] / "docs"


def test_interval_of_a_mean_is_students():
    e = t_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446305284263 * math.sqrt(5 / 3) / 2  # t_{0.975, 3} * sd / sqrt(4)
    assert (e.value, e.count, e.method) == (2.5, 4, "t")
    assert e.high - e.value == pytest.approx(half, rel=1e-12) and e.value - e.low == pytest.approx(half, rel=1e-12)


def test_equal_seeds_have_no_width_and_one_seed_no_end():
    assert t_interval([0.3, 0.3, 0.3]).half_width == 0
    assert t_interval([0.3]).high == math.inf


@pytest.mark.parametrize(
    ("values", "bounds", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.0], {"above": 0.5}, HOLDS),
        ([1.0, 1.1, 0.9, 1.0], {"above": 1.5}, FAILS),
        ([1.0, 1.1, 0.9, 1.0], {"above": 1.0}, INCONCLUSIVE),
        ([1.0, 1.1, 0.9, 1.0], {"below": 0.5}, FAILS),
        ([1.0, 1.1, 0.9, 1.0], {"above": 0.5, "below": 1.5}, HOLDS),
        ([1.0, 1.1, 0.9, 1.0], {"above": 0.95, "below": 1.5}, INCONCLUSIVE),
        ([1.0, 1.1, 0.9, 1.0], {"above": 1.3, "below": 1.5}, FAILS),
        ([1.0, 1.1, 0.9], {"above": 0.1}, INCONCLUSIVE),  # too few seeds, whatever they say
    ],
)
def test_verdict_follows_from_where_the_interval_lies(values, bounds, verdict):
    judge = Predictions(Prediction(name="x", what="x", **bounds))
    found = judge([{"x": v} for v in values])
    assert found.verdict == verdict
    assert verdict in found.statements[0].text


def test_one_failed_prediction_decides_and_all_must_hold():
    assert combine([HOLDS, HOLDS]) == HOLDS
    assert combine([HOLDS, INCONCLUSIVE]) == INCONCLUSIVE
    assert combine([HOLDS, INCONCLUSIVE, FAILS]) == FAILS
    assert combine([]) == INCONCLUSIVE


def test_bad_predictions_and_results_are_refused():
    with pytest.raises(ConfigError, match="needs a bound"):
        Prediction(name="x", what="x")
    with pytest.raises(ConfigError, match="above < below"):
        Prediction(name="x", what="x", above=2, below=1)
    with pytest.raises(ConfigError, match="can fail"):
        Predictions()
    with pytest.raises(DataError, match="'y'"):
        over_seeds([{"x": 1.0}, {"x": 1.0, "y": 2.0}])
    with pytest.raises(DataError, match="not measured"):
        Predictions(Prediction(name="z", what="z", above=0))([{"x": 1.0}])
    with pytest.raises(DataError, match="finite"):
        t_interval([1.0, math.nan])


def test_slope_recovers_an_exponent():
    assert log_slope([1, 10, 100], [3, 3e2, 3e4]) == pytest.approx(2)
    with pytest.raises(DataError, match="positive"):
        log_slope([1, 2], [0, 1])


def test_every_line_of_the_chapter_has_a_claim_that_says_what_it_needs():
    claims = load_all()
    numbers = [c.number for c in claims]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 14))
    assert len({c.name for c in claims}) == len(claims)  # a line may have two experiments
    for c in claims:
        assert len(c.seeds) >= 4 and c.minutes <= 6, c.name
        assert c.line and c.source and len(c.design) > 100, c.name
    with pytest.raises(ConfigError, match="compounding"):
        load("no_such_claim")


def fake(name: str = "compounding") -> Claim:
    return replace(
        load(name),
        measure=lambda seed: {"x": 1.0 + 0.01 * seed},
        judge=Predictions(Prediction(name="x", what="the number", above=0.5)),
    )


def test_a_run_stores_its_numbers_and_its_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "load", lambda name: fake(name))
    result = stored.run_claim(fake())
    assert result["verdict"] == HOLDS and result["seeds"] == [0, 1, 2, 3]
    assert [r["x"] for r in result["results"]] == [1.0, 1.01, 1.02, 1.03]
    stored.save(result, tmp_path / "claims")
    back = stored.stored_results(tmp_path / "claims")
    assert back == {"compounding": json.loads(json.dumps(result))}
    page = stored.write_page(tmp_path / "claims").read_text()
    assert "| **holds** | 4 |" in page and "| 1 of 1 |" in page and "the number: 1.015 [" in page


def test_results_of_unknown_claims_are_refused(tmp_path):
    (tmp_path / "nonsense.json").write_text("{}")
    with pytest.raises(DataError, match="nonsense"):
        stored.stored_results(tmp_path)


@pytest.mark.parametrize("name", CLAIMS)
def test_stored_verdicts_are_what_the_claims_say_of_the_stored_numbers(name):
    result = stored.stored_results(DOCS / "claims")[name]
    again = stored.judge_again(result).to_json()
    assert again == {key: result[key] for key in again}
    assert len(result["seeds"]) >= 4


def test_the_page_is_made_from_the_stored_results():
    assert (DOCS / "claims.md").read_text() == stored.page(stored.stored_results(DOCS / "claims"))
