"""Questions that a gate or a monitor decides on are not those that are reported, where there are enough for both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_family_runs import events, graduating
from test_job import job, rejection

from tutelage.cli.runs import show
from tutelage.data.store import TrajectoryStore
from tutelage.errors import ConfigError
from tutelage.methods.config import load_config
from tutelage.methods.control_arm import run_job
from tutelage.methods.job import measuring_of
from tutelage.methods.probing import probe_tasks
from tutelage.methods.workbench import Workbench

torch.set_num_threads(1)


def gated(folder: Path, model: Path, questions: int, **more: Any) -> dict[str, Any]:
    settings = rejection(folder, model, probe={"questions": questions, "n": 2}, **more)
    settings["tasks"] |= {"heldout": 6}
    return settings


@pytest.mark.parametrize(
    ("questions", "more", "expected"),
    [
        (3, {}, (3, 3, 0)),  # as many are left
        (4, {}, (6, 0, 4)),  # too few for both
        (64, {}, (6, 0, 6)),
        (3, {"gate": False}, (6, 0, 0)),  # nothing is decided
        (3, {"gate": False, "until": "graduation"}, (6, 0, 6)),  # which takes 128
        (4, {"evaluation": {"leave_out": 4}}, (2, 4, 0)),
        (3, {"evaluation": {"leave_out": 0}}, (6, 0, 3)),
        (3, {"gate": False, "until": "graduation", "then": "rl", "graduation": {"min_tasks": 2}}, (3, 3, 0)),
        (1, {"gate": False, "until": "graduation", "then": "rl", "graduation": {"min_tasks": 1}}, (5, 1, 0)),
    ],
)
def test_what_is_measured_and_what_is_left_to_the_probes(
    tmp_path: Path, tiny_folder: Path, questions: int, more: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    config, folder = load_config(gated(tmp_path, tiny_folder, questions, **more))
    bench = Workbench(config, folder)
    measuring = measuring_of(config, bench)
    facts = measuring.facts()
    assert (facts["measured"], facts["left_out"], facts["shared"]) == expected
    assert ("note" in facts) == (expected[2] > 0)
    probed = {t.hash for t in probe_tasks(bench, config.stages[0])}
    assert len(probed & {t.hash for t in measuring.tasks}) == expected[2]
    assert len({t.hash for t in measuring.tasks}) == expected[0]
    bench.close()


def test_rl_after_graduation_may_have_a_gate_of_its_own(tmp_path: Path, tiny_folder: Path) -> None:
    rl = {"gate": True, "probe": {"questions": 3}}
    more = {"gate": False, "until": "graduation", "then": "rl", "graduation": {"min_tasks": 1}, "rl": rl}
    config, folder = load_config(gated(tmp_path, tiny_folder, 1, **more))
    bench = Workbench(config, folder)
    assert measuring_of(config, bench).facts() == {"measured": 3, "left_out": 3, "shared": 0}
    bench.close()


def test_leaving_out_every_question_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    settings = gated(tmp_path, tiny_folder, 3, evaluation={"leave_out": 6})
    with pytest.raises(ConfigError, match=r"evaluation\.leave_out=6 leaves none of the 6 held-out questions"):
        job(settings)()


def test_a_gated_run_and_its_control_arm_are_measured_on_the_same_other_questions(
    tmp_path: Path, tiny_folder: Path
) -> None:
    config, folder = load_config(gated(tmp_path, tiny_folder, 3, match_budget="random", rounds=1))
    result = run_job(config, folder)
    assert result["questions"] == {"measured": 3, "left_out": 3, "shared": 0}
    assert result["before"]["num_tasks"] == result["match_budget"]["control"]["num_tasks"] == 3
    bench = Workbench(config, folder)
    probed = {t.hash for t in probe_tasks(bench, config.stages[0])}
    for run in (tmp_path / "run", tmp_path / "run" / "control-random"):
        assert not probed & {t.task_hash for t in TrajectoryStore(run / "evaluation" / "trajectories")}
    bench.close()


def test_a_result_on_the_probes_own_questions_says_so_where_it_is_printed(tmp_path: Path, tiny_folder: Path) -> None:
    settings = graduating(tmp_path, tiny_folder, "run")
    settings["tasks"] |= {"heldout": 3}
    settings["evaluation"] = {"n": 2, "ks": [1], "controls": False}
    settings["rounds"], settings["graduation"]["min_tasks"] = 1, 128
    result = job(settings)()
    assert result["questions"]["shared"] == 3
    assert any("partly chosen by them" in e["note"] for e in events(tmp_path / "run", "note"))
    out = Console(record=True, width=200)
    show(result, out, as_json=False)
    assert "3 of the 3 questions measured on are also those" in " ".join(out.export_text().split())
