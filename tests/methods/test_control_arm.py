"""The control arm: a run again on as many random completions; and what budgets are read from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_job import StopAfter, demonstrations, rejection

from tutelage.data.store import TrajectoryStore
from tutelage.errors import ConfigError, Interrupted
from tutelage.methods.config import load_config
from tutelage.methods.control_arm import ARM, NAME, run_job
from tutelage.methods.job import config_of
from tutelage.methods.keeping import kept_counts, taken_back
from tutelage.train.stop import StopRequest

torch.set_num_threads(1)


def matched(folder: Path, model: Path, run: str = "run", **more: Any) -> dict[str, Any]:
    settings = rejection(folder, model, run, **{"gate": False, "match_budget": "random", **more})
    settings["keep"] |= {"cap": 1}
    return settings


def run(settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    config, folder = load_config(settings)
    return run_job(config, folder, **options)


def test_the_control_arm_keeps_as_many_of_each_prompt_and_is_compared(tmp_path: Path, tiny_folder: Path) -> None:
    result = run(matched(tmp_path, tiny_folder))
    root = tmp_path / "run"
    first, arm = (kept_counts(f / "trajectories") for f in (root, root / ARM))
    assert first == arm and {r for _, r, _, _ in first} == {0, 1} and max(first.values()) == 1
    by_verdict = [t.verdict.is_accepted for t in TrajectoryStore(root / ARM / "trajectories") if t.weight]
    assert not all(by_verdict)  # drawn by lot, whatever the verdict
    assert all(t.verdict.is_accepted for t in TrajectoryStore(root / "trajectories") if t.weight)
    matched_ = result["match_budget"]
    assert matched_["kept"] == matched_["control_kept"] and sum(matched_["kept"]) == first.total()
    control = result["controls"][NAME]
    assert control["value"] == matched_["control"]["pass@1"]["value"]
    expected = result["after"]["pass@1"]["value"] - control["value"]
    assert control["gain"]["value"] == pytest.approx(expected) and len(control["gain"]["ci95"]) == 2
    assert matched_["gains"]["pass@2"]["tasks"] == 3
    assert json.loads((root / "result.json").read_text())["match_budget"]["control_kept"] == matched_["kept"]
    events = [json.loads(x) for x in (root / ARM / "events.jsonl").read_text().splitlines()]
    assert not any(e["event"] == "verdict" for e in events)  # nothing stops it or takes its rounds back


def test_a_prompt_that_comes_twice_in_a_round_has_a_budget_each_time(tmp_path: Path, tiny_folder: Path) -> None:
    settings = matched(tmp_path, tiny_folder, rounds=3)
    settings["keep"]["cap"] = 2
    settings["rollout"]["prompts_per_round"] = 7  # of 9: from the second round on, some come twice
    result = run(settings)["match_budget"]
    first, arm = (kept_counts(tmp_path / "run" / f / "trajectories") for f in ("", ARM))
    assert result["kept"] == result["control_kept"] and first == arm
    twice = {key[:3] for key in first if key[3] == 1}
    assert any(first[(*key, 0)] != first[(*key, 1)] for key in twice)


def test_the_arm_keeps_nothing_in_rounds_that_the_run_took_back(tmp_path: Path, tiny_folder: Path) -> None:
    """A far too high learning rate: the gate acts."""
    settings = matched(tmp_path, tiny_folder, gate=True, probe={"questions": 3, "n": 64}, rounds=4)
    settings["keep"]["cap"] = None
    settings["train"] |= {"lr": 0.3, "epochs": 2}
    result = run(settings)["match_budget"]
    gone = taken_back(tmp_path / "run")
    assert gone and len(result["kept"]) == len(result["control_kept"])
    assert result["kept"] == result["control_kept"]
    assert {(0, r) for r, kept in enumerate(result["kept"]) if kept == 0} == gone


@pytest.mark.parametrize("stop_at", [70])
def test_a_stopped_pair_of_arms_resumes_to_the_same_numbers(tmp_path: Path, tiny_folder: Path, stop_at: int) -> None:
    whole = run(matched(tmp_path, tiny_folder, "whole"))
    stop = StopRequest()
    with pytest.raises(Interrupted):
        run(matched(tmp_path, tiny_folder, "cut"), stop=stop, progress=StopAfter(stop, stop_at))
    config, folder = config_of(tmp_path / "cut")
    again = run_job(config, folder, is_resume=True)
    assert again["controls"] == whole["controls"]
    assert again["match_budget"]["gains"] == whole["match_budget"]["gains"]


def test_rest_gives_its_budget_to_every_improve(tmp_path: Path, tiny_folder: Path) -> None:
    settings = matched(tmp_path, tiny_folder, method="rest", thresholds=[0.0, 0.4], rounds=2)
    result = run(settings)["match_budget"]
    assert result["kept"] == result["control_kept"] and min(result["kept"]) > 0


def test_what_cannot_be_matched_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="keeps some of its samples"):
        run({**demonstrations(tmp_path, tiny_folder), "match_budget": "random"})
    with pytest.raises(ConfigError, match="evaluation must not be null"):
        run(matched(tmp_path, tiny_folder, evaluation=None))
    settings = matched(tmp_path, tiny_folder, match_budget=None)
    settings["keep"]["random_budget"] = str(tmp_path)
    with pytest.raises(ConfigError, match="holds no trajectories"):
        run(settings)
