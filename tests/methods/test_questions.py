"""Questions are looked at before sampling, and a dry run sees every stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_family_runs import graduating
from test_job import job, rejection

from tutelage.cli.runs import dry_run
from tutelage.errors import VerifierError
from tutelage.methods.config import load_config
from tutelage.methods.estimate import estimate
from tutelage.methods.handover import plan_of
from tutelage.methods.workbench import Workbench

torch.set_num_threads(1)


def test_questions_that_cannot_be_judged_stop_the_run_before_it_samples(tmp_path: Path, tiny_folder: Path) -> None:
    settings = rejection(tmp_path, tiny_folder, gate=False, evaluation=None)
    settings["verifier"] = {"kind": "last_number", "workers": 1}
    lines = [{"question": f"What is {i}?", "answer": "seven" if i == 5 else str(i)} for i in range(12)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    made = job(settings)
    with pytest.raises(VerifierError, match="cannot judge 1 of the tasks"):
        made()
    assert not list((tmp_path / "run").glob("work/*"))


def test_what_the_template_drops_of_the_questions_is_noted(tmp_path: Path, tiny_folder: Path) -> None:
    settings = rejection(tmp_path, tiny_folder, gate=False, evaluation=None)
    config, folder = load_config(settings)
    bench = Workbench(config, folder)
    tools = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}]
    task = bench.train_tasks(config.stages[0].tasks)
    assert not [n for n in bench.notes if "prompts" in n]
    from dataclasses import replace

    task[0] = replace(task[0], tools=tuple(tools))
    plan_of(config, bench)
    assert any("in 1 prompts" in n and "rejection_sampling" in n for n in bench.notes), bench.notes
    bench.close()


def test_a_dry_run_counts_and_shows_the_stage_after_graduation(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = graduating(tmp_path, tiny_folder, "run", then="rl", rl={"rounds": 7})
    config, folder = load_config(settings)
    bench = Workbench(config, folder)
    plan = plan_of(config, bench)
    both, first = estimate(bench, plan), estimate(bench, plan[:1])
    bench.close()
    prompts, n, longest = 12, 4, 6
    assert both.tokens_sampled_at_most - first.tokens_sampled_at_most == 7 * prompts * n * longest
    dry_run(config, folder, Console(stderr=True), as_json=True, yes=True)
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [s["stage"] for s in shown["plan"]] == ["rejection_sampling", "rejection_sampling_rl"]
    assert shown["tokens_sampled_at_most"] == both.tokens_sampled_at_most
