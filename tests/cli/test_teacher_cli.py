"""`tutelage teacher` at the command line: what it prints, as JSON too, and its exit codes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.cli import main
from tutelage.testing.tiny import save_tiny

torch.set_num_threads(1)


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tutelage", "teacher", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_generate_cache_and_exit_codes(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 2?", "answer": "3"}\n')
    given = [
        f"teacher.name={tiny_folder}",
        f"tasks.path={tmp_path / 'q.jsonl'}",
        "rollout.n=2",
        "rollout.max_new_tokens=4",
        "filters.truncated=false",
        "filters.max_other_script=null",
    ]
    code, out, _ = command(capsys, monkeypatch, "generate", *given, "--out", tmp_path / "a", "--json")
    assert code == 0 and json.loads(out)["num_answers"] == 4
    code, out, _ = command(capsys, monkeypatch, "generate", *given, "--out", tmp_path / "a")
    assert code == 0 and "4 answers to 2 tasks" in out and "already done" in out and "completion tokens" in out
    code, _, err = command(capsys, monkeypatch, "generate", *given, "seed=3", "--out", tmp_path / "a")
    assert code == 2 and "other settings" in err
    code, _, err = command(capsys, monkeypatch, "generate", "teacher.nam=x")
    assert code == 2 and 'did you mean "teacher.name"' in err
    code, out, _ = command(capsys, monkeypatch, "cache", tiny_folder, tmp_path / "a", "--out", tmp_path / "c")
    assert code == 0 and "bytes a token" in out and "KL from the teacher" in out
    code, out, _ = command(capsys, monkeypatch, "cache", tiny_folder, tmp_path / "a", "--out", tmp_path / "c", "--json")
    assert code == 0 and json.loads(out)["num_trajectories"] > 0
    hot = ["--out", tmp_path / "hot", "--temperature", 2, "--k", 9]
    code, _, err = command(capsys, monkeypatch, "cache", tiny_folder, tmp_path / "a", *hot)
    about = json.loads((tmp_path / "hot" / "cache.json").read_text())
    assert (code, about["temperature"], about["k"]) == (0, 2.0, 9), err
    config = {
        "method": "distill_off_policy",
        "model": {"name": str(tiny_folder), "system_prompt": "Say a number."},
        "teacher": {"name": str(tiny_folder)},
        "tasks": {"path": "q.jsonl"},
        "divergence": {"kind": "forward_kl", "temperature": 3},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    own = ["cache", tmp_path / "c.yaml", f"data.path={tmp_path / 'q.jsonl'}", "--out", tmp_path / "own", "--json"]
    code, out, err = command(capsys, monkeypatch, *own)
    assert code == 0 and json.loads(out)["num_trajectories"] == 2, err
    about = json.loads((tmp_path / "own" / "cache.json").read_text())
    assert (about["temperature"], about["teacher"]) == (3.0, str(tiny_folder))
    code, _, err = command(capsys, monkeypatch, "cache", tiny_folder, "k=3", "--out", tmp_path / "none")
    assert code == 2 and "TEACHER and DATA" in err


def test_check_misses_a_missing_teacher_before_anything_is_sampled(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.jsonl").write_text("".join(f'{{"question": "{i}?", "answer": "{i}"}}\n' for i in range(6)))
    config = {
        "method": "distill_on_policy",
        "model": {"name": str(tiny_folder), "precision": "float32"},
        "teacher": {"name": "runs/distillation/teacher"},
        "tasks": {"path": "q.jsonl", "heldout": 4},
        "verifier": {"kind": "last_number", "workers": 1},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    (tmp_path / ".pytest_cache").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tutelage.methods.teach.evaluate", lambda *a, **k: pytest.fail("sampled"))
    code, _, err = command(capsys, monkeypatch, "check", tmp_path / "c.yaml")
    assert code == 2 and "runs/distillation/teacher" in err and "did you mean" not in err


@pytest.mark.parametrize("is_better", [False, True])
def test_check_says_whether_the_teacher_is_better(
    tmp_path: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_better: bool,
) -> None:
    teacher = save_tiny(tmp_path / "teacher", seed=5)
    (tmp_path / "q.jsonl").write_text("".join(f'{{"question": "{i}?", "answer": "x"}}\n' for i in range(6)))
    rule = "any('psst' in str(m['content']) for m in trajectory['messages'])"
    (tmp_path / "judge.py").write_text(f"def judge(task, completion, trajectory):\n    return {rule}\n")
    config = {
        "method": "distill_on_policy",
        "model": {"name": str(tiny_folder), "precision": "float32"},
        "teacher": {"name": str(teacher), "hint": "psst: {answer}" if is_better else None},
        "tasks": {"path": "q.jsonl", "heldout": 4},
        "verifier": {
            "kind": "python",
            "function": "judge.py:judge",
            "workers": 1,
            "accept_truncated": True,
            "options": {"isolate": False},
        },
        "rollout": {"n": 1, "max_new_tokens": 4},
        "evaluation": {"n": 2, "ks": [1]},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    code, out, err = command(capsys, monkeypatch, "check", tmp_path / "c.yaml", "--json")
    assert out, err
    report = json.loads(out)
    assert code == (0 if is_better else 1)
    # It is told the answer where it is better; its prefixes are compared with its hint, the student's without.
    assert report["on_student_prefixes"]["reverse_kl"] > 0 and report["on_teacher_prefixes"]["num_tokens"] > 0
    assert report["pass@1"]["teacher"]["value"] == float(is_better)
