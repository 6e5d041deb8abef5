"""`tutelage claims`: lists, runs, stores."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tutelage.claims import registry, results
from tutelage.claims.base import Prediction, Predictions
from tutelage.cli.main import app


@pytest.fixture
def quick(monkeypatch):
    """Every claim measured in no time."""
    true = registry.load

    def load(name):
        return replace(
            true(name),
            measure=lambda seed: {"x": seed + 1.0},
            judge=Predictions(Prediction(name="x", what="the number", above=0.0)),
        )

    monkeypatch.setattr(registry, "load", load)
    monkeypatch.setattr(results, "load", load)


def test_list_names_every_claim():
    out = CliRunner().invoke(app, ["claims", "--list", "--json"])
    assert out.exit_code == 0
    assert [c["name"] for c in json.loads(out.stdout)] == list(registry.CLAIMS)


def test_a_claim_is_run_printed_and_stored(quick, tmp_path):
    out = CliRunner().invoke(app, ["claims", "compounding", "--out", str(tmp_path / "claims")])
    assert out.exit_code == 0, out.output
    for expected in ("2. compounding", "Ross & Bagnell", "design", "2.5 [", "predicted above 0", "(4 seeds"):
        assert expected in out.output, expected
    assert json.loads((tmp_path / "claims" / "compounding.json").read_text())["verdict"] == "holds"
    assert "| **holds** |" in (tmp_path / "claims.md").read_text()


def test_json_and_fewer_seeds_decide_nothing(quick):
    out = CliRunner().invoke(app, ["claims", "compounding", "--seeds", "2", "--json"])
    assert out.exit_code == 0, out.output
    (result,) = json.loads(out.stdout)
    assert result["verdict"] == "inconclusive" and result["measured"]["x"]["value"] == 1.5


def test_unknown_claim_is_an_error_with_the_known_ones():
    out = CliRunner().invoke(app, ["claims", "nonsense"])
    assert out.exit_code != 0 and "compounding" in str(out.exception)
