"""The command line: what it prints, and what it exits with."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tutelage.cli import main


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tutelage", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    return call


@pytest.fixture
def config(tmp_path: Path, tiny_folder: Path) -> Path:
    (tmp_path / "judge.py").write_text(
        "def judge(task, completion, trajectory):\n    return len(completion) % 2 == 0\n"
    )
    questions = "".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(8))
    (tmp_path / "q.jsonl").write_text(questions)
    body = {
        "method": "rejection_sampling",
        "run_dir": str(tmp_path / "run"),
        "model": {"name": str(tiny_folder), "precision": "float32"},
        "tasks": {"kind": "jsonl", "path": "q.jsonl", "heldout": 3},
        "verifier": {"kind": "python", "function": "judge.py:judge", "workers": 1, "accept_truncated": True},
        "rollout": {"n": 3, "max_new_tokens": 5},
        "keep": {"distinct": None, "cap": None, "drop_truncated": False},
        "train": {"lr": 1e-3, "batch_size": 4, "epochs": 1},
        "evaluation": {"n": 2, "ks": [1, 2], "controls": False},
        "rounds": 1,
        "gate": False,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def test_train_then_eval_against_the_base(cli: Any, config: Path, tiny_folder: Path) -> None:
    code, out, err = cli("train", str(config), "--json")
    result = json.loads(out)  # messages went to stderr
    assert code == 0 and result["status"] == "done" and "rejection_sampling" in err
    run = result["run_dir"]
    code, out, _ = cli("train", str(config))
    assert code == 2
    code, out, _ = cli("eval", run, str(config), "--against", str(tiny_folder), "--json")
    body = json.loads(out)
    assert code == 0 and set(body["models"]) == {run, str(tiny_folder)}
    assert set(body["gain"]["pass@1"]) >= {"value", "ci95"} and len(body["drift"]) == 2
    code, out, _ = cli("eval", run, str(config))
    assert code == 0 and "pass@1" in out and "chance" in out


def test_a_run_prints_its_table(cli: Any, config: Path) -> None:
    code, out, _ = cli("train", str(config))
    assert code == 0
    for word in ("before", "after", "chance", "Controls", "gain in pass@1 on held-out questions", "round 0", "model:"):
        assert word in out


def test_a_dry_run_shows_samples_and_writes_nothing(cli: Any, config: Path, tmp_path: Path) -> None:
    code, out, _ = cli("train", str(config), "--dry-run")
    assert code == 0 and "three samples" in out and "memory" in out and "What is" in out
    assert not (tmp_path / "run").exists()
    code, out, _ = cli("train", str(config), "--dry-run", "--json")
    assert code == 0 and json.loads(out)["plan"][0]["signal"] == "HardTargets"


def test_methods_are_listed_and_shown_whole(cli: Any) -> None:
    code, out, _ = cli("methods")
    assert code == 0 and "rejection_sampling" in out and "Recorded(demonstrations)" in out
    code, out, _ = cli("methods", "sft")
    assert code == 0 and "train.lr" in out and "gotcha" in out
    code, out, _ = cli("methods", "--json")
    assert {"name", "source", "signal", "eats", "policy", "when", "gotcha", "cite"} <= set(json.loads(out)[0])
    code, _, err = cli("methods", "stf")
    assert code == 2 and "unknown" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no such file"),
        (["resume", "nowhere"], "is not the folder of a run"),
        (["frobnicate"], "frobnicate"),
        (["train"], "Missing argument"),
    ],
)
def test_bad_input_exits_with_2_and_a_message(cli: Any, arguments: list[str], message: str) -> None:
    code, _, err = cli(*arguments)
    assert code == 2 and message in err


def test_all_rejected_exits_with_2(cli: Any, config: Path) -> None:
    (config.parent / "judge.py").write_text("def judge(task, completion, trajectory):\n    return False\n")
    code, _, err = cli("train", str(config))
    assert code == 2 and "0 were accepted" in err


def test_a_stopped_run_exits_with_130_and_resumes(cli: Any, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.train.session import Session

    after_step = Session.after_step

    def stop(self: Session, *args: Any) -> None:
        self.stop.request("SIGTERM")
        after_step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "after_step", stop)
        code, _, err = cli("train", str(config))
    assert code == 130 and "state saved" in err
    code, out, _ = cli("resume", str(config.parent / "run"), "--json")
    assert code == 0 and json.loads(out)["status"] == "done"
