"""The ladder: its task, its plan carried out by the monitor, and its report. The whole of it is a slow test."""

import json
import re
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from rich.console import Console
from test_family_runs import graduating
from test_job import job

from tutelage.cli import ladder as command
from tutelage.errors import ConfigError
from tutelage.methods.ladder import CHARACTERS, DEMONSTRATIONS, FRESH, HELDOUT, QUESTIONS, worked_sum, write_ladder
from tutelage.methods.stages_report import report_stages, stage_rows
from tutelage.policies.load import load_model, load_tokenizer
from tutelage.policies.scratch import character_tokenizer
from tutelage.text import ChatText

torch.set_num_threads(1)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_answers_and_demonstrations_are_sums_and_no_question_is_there_twice(tmp_path: Path) -> None:
    make = partial(write_ladder, demonstrations=60, questions=20, heldout=10, fresh=30, layers=1, width=16)
    weights = make(tmp_path)
    found = {n: rows(tmp_path / n) for n in (DEMONSTRATIONS, QUESTIONS, HELDOUT, FRESH)}
    asked = [r.get("question") or r["prompt"] for rs in found.values() for r in rs]
    assert len(asked) == len(set(asked)) == 120
    for r in (*found[QUESTIONS], *found[HELDOUT], *found[FRESH]):
        assert int(r["answer"].rpartition("=")[2]) == sum(map(int, re.findall(r"[+-]?\d", r["question"])))
        assert 4 <= len(re.findall(r"\d", r["question"])) <= 7
    again = tmp_path / "again"
    assert make(again) == weights
    assert (again / DEMONSTRATIONS).read_text() == (tmp_path / DEMONSTRATIONS).read_text()
    assert sum(p.numel() for p in load_model(str(tmp_path / "model")).parameters()) == weights


def test_a_careless_teacher_errs_as_often_as_it_says_and_goes_on_from_its_error() -> None:
    rng, wrong, steps = Random(0), 0, 0
    for _ in range(400):
        made = worked_sum(rng, 5, error=0.2)
        total = int(made.question[0])
        for step, sign, number in zip(made.worked.split(","), *_parts(made.question), strict=True):
            left, right = step.split("=")
            assert left == f"{total}{sign}{number}"
            exact = total + number if sign == "+" else total - number
            assert abs(int(right) - exact) <= 1
            wrong, steps, total = wrong + (int(right) != exact), steps + 1, int(right)
    assert 0.17 < wrong / steps < 0.23


def _parts(question: str) -> tuple[list[str], list[int]]:
    return re.findall(r"[+-]", question), [int(n) for n in re.findall(r"\d", question)[1:]]


def test_the_tokenizer_reads_every_character_as_one_token_and_back(tmp_path: Path) -> None:
    write_ladder(tmp_path, demonstrations=1, questions=1, heldout=1, fresh=1, layers=1, width=16)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    ids = tokenizer.encode("12+3=15", add_special_tokens=False)
    assert len(ids) == 7 and tokenizer.decode(ids) == "12+3=15"
    text = ChatText.from_pretrained(str(tmp_path / "model"))
    [spans] = text.render_conversation([{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "1+2=3"}])
    trained = [i for s in spans if s.is_trainable for i in s.token_ids]
    assert tokenizer.decode(trained) == "1+2=3<end>" and tokenizer.eos_token_id == trained[-1]
    with pytest.raises(ConfigError, match="each of them once"):
        character_tokenizer("aa")
    assert len(set(CHARACTERS)) == len(CHARACTERS)


def test_stages_are_reported_with_intervals_gains_and_the_monitors_words(tmp_path: Path, tiny_folder: Path) -> None:
    rl = {"rounds": 1, "train": {"lr": 1e-4, "batch_size": None}, "truncated": "keep"}
    settings = graduating(tmp_path, tiny_folder, "run", then="rl", rl=rl)
    settings["tasks"] |= {"heldout": 3}
    settings["evaluation"] = {"n": 4, "ks": [1, 4], "controls": False}
    job(settings)()
    report = report_stages(tmp_path / "run", group=2)
    first, last = report["stages"]
    assert [s["name"] for s in (first, last)] == ["rejection_sampling", "rejection_sampling_rl"]
    assert first["ended_by"] == "GRADUATE" and first["why"].startswith("G1") and last["ended_by"] == "ROUNDS"
    assert first["verdicts"][-1][1] == "GRADUATE" and first["probing"]["all_tokens"] > 0
    for s in (first, last):
        for name in ("pass@1", "pass@4", "all_same", "all_wrong", "all_right"):
            low, high = s[name]["ci95"]
            assert 0 <= low <= s[name]["value"] <= high <= 1
        same = s["all_wrong"]["value"] + s["all_right"]["value"]
        assert s["all_same"]["value"] == pytest.approx(same)
    gain = last["gain"]["pass@1"]
    assert gain["value"] == pytest.approx(last["pass@1"]["value"] - first["pass@1"]["value"])
    assert json.loads((tmp_path / "run" / "stages.json").read_text()) == json.loads(json.dumps(report))
    assert report_stages(tmp_path / "run", group=2) == report  # nothing is evaluated twice
    table = stage_rows(report)
    assert table[0][0] == "rejection_sampling" and len(table[0][1]) == 5
    out = Console(record=True, width=160)
    command.show(report, out)
    shown = " ".join(out.export_text().split())
    assert "ended by GRADUATE" in shown and "3 of the 3 questions measured on are also those that the gate" in shown
    with pytest.raises(ConfigError, match="not the folder of a run"):
        report_stages(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_monitor_ends_imitation_and_rl_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.run(tmp_path / "ladder", [], Console(stderr=True), as_json=True)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    cold, practice, rl = report["stages"]
    assert practice["ended_by"] in ("GRADUATE", "STOP_NARROWING") and practice["rounds"] < 12
    assert practice["gain"]["pass@1"]["ci95"][0] > 0 and practice["entropy_nats"] < cold["entropy_nats"]
    assert rl["ended_by"] == "ROUNDS" and rl["gain"]["pass@1"]["ci95"][0] > 0
