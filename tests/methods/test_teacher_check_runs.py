"""The teacher check of a run: every teacher for itself, as it will be used, and a word about who is not checked."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.errors import ConfigError
from tutelage.evals.teacher_check import check_teacher, compare_prefixes
from tutelage.methods import grading, teach
from tutelage.methods.config import load_config
from tutelage.methods.job import Job
from tutelage.policies.teachers import InProcessTeacher, SelfTeacher
from tutelage.testing.tiny import save_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher") / "teacher", seed=5)


def settings(folder: Path, student: Path, teacher: dict[str, Any], run: str = "run", **more: Any) -> dict[str, Any]:
    """Questions of two families, and a verifier that takes nothing: no teacher is better."""
    (folder / "judge.py").write_text("def judge(task, completion, trajectory):\n    return False\n")
    (folder / "q.jsonl").write_text(
        "".join(
            json.dumps({"question": f"What is {i}?", "answer": str(i), **({"name": "algebra"} if i % 2 else {})}) + "\n"
            for i in range(12)
        )
    )
    return {
        "method": "distill_on_policy",
        "run_dir": str(folder / run),
        "model": {"name": str(student), "precision": "float32"},
        "teacher": teacher,
        "tasks": {"kind": "jsonl", "path": str(folder / "q.jsonl"), "heldout": 4},
        "verifier": {
            "kind": "python",
            "function": f"{folder}/judge.py:judge",
            "allow_code_outside": True,
            "workers": 1,
            "options": {"isolate": False},
        },
        "rollout": {"n": 2, "max_new_tokens": 6, "prompts_per_round": 3},
        "train": {"lr": 3e-3, "batch_size": None, "schedule": "constant", "warmup": 0.0},
        "divergence": {"kind": "reverse_kl"},
        "evaluation": {"n": 2, "ks": [1], "controls": False},
        "rounds": 1,
        **more,
    }


def run(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's teacher checks."""
    config, folder = load_config(given)
    Job(config, folder)()
    events = [json.loads(x) for x in (Path(given["run_dir"]) / "events.jsonl").read_text().splitlines()]
    return [e for e in events if e["event"] == "teacher_check"]


@pytest.mark.parametrize("default", [{"name": "average"}, {"is_checked": False}], ids=["average", "unchecked"])
def test_the_default_teachers_settings_are_not_those_of_a_familys_own(
    tmp_path: Path, tiny_folder: Path, master: Path, default: dict[str, Any]
) -> None:
    def with_own(own: dict[str, Any]) -> dict[str, Any]:
        return {"name": str(master), **default, "by_task": {"algebra": {"name": str(master), **own}}}

    with pytest.raises(ConfigError, match=r"not better.*allow_worse=true"):
        run(settings(tmp_path, tiny_folder, with_own({})))
    checks = run(settings(tmp_path, tiny_folder, with_own({"allow_worse": True}), "allowed"))
    assert [c.get("task") for c in checks] == [None, "algebra"]
    skipped, checked = checks
    assert skipped["skipped"] == ("an average of the student" if "name" in default else "teacher.is_checked is false")
    assert checked["pass@1"]["teacher"]["value"] == 0.0 and "skipped" not in checked


def test_a_familys_own_teacher_that_is_not_checked_needs_no_question(
    tmp_path: Path, tiny_folder: Path, master: Path
) -> None:
    own = {"name": str(master), "is_checked": False}
    teacher = {"name": str(master), "allow_worse": True, "by_task": {"geometry": own}}
    checks = run(settings(tmp_path, tiny_folder, teacher))
    assert checks[1]["task"] == "geometry" and "is_checked" in checks[1]["skipped"]
    with pytest.raises(ConfigError, match="'geometry', and no held-out question"):
        run(settings(tmp_path, tiny_folder, teacher | {"by_task": {"geometry": {"name": str(master)}}}, "no"))


def cached(folder: Path, student: Path, master: Path, **teacher: Any) -> dict[str, Any]:
    demos = folder / "demos.jsonl"
    demos.write_text("".join(json.dumps({"question": f"{i}?", "answer": f"it is {i}"}) + "\n" for i in range(4)))
    teach.cache(teach.cache_config(str(master), str(demos), student=str(student)), folder / "cache")
    given = settings(folder, student, {"name": str(master), "cache": str(folder / "cache"), **teacher})
    given |= {"method": "distill_off_policy", "data": {"path": str(demos)}, "divergence": {"kind": "forward_kl"}}
    del given["rounds"], given["rollout"]
    return given


def test_the_teacher_of_a_cache_is_checked_where_it_can_be_loaded(
    tmp_path: Path, tiny_folder: Path, master: Path
) -> None:
    given = cached(tmp_path, tiny_folder, master)
    with pytest.raises(ConfigError, match=r"not better"):
        run(given)
    given["teacher"] |= {"allow_worse": True}
    [check] = run(given | {"run_dir": str(tmp_path / "allowed")})
    assert check["pass@1"]["teacher"]["value"] == 0.0 and check["on_student_prefixes"]["forward_kl"] > 0


def test_the_teacher_of_a_cache_that_is_gone_is_said_not_to_be_checked(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master = save_tiny(tmp_path / "gone", seed=5)
    given = cached(tmp_path, tiny_folder, master)
    (master / "config.json").unlink()
    [check] = run(given)
    assert "cannot be loaded" in check["skipped"] and "config.json" in check["skipped"]


@pytest.mark.parametrize("told", [{"hint": "It is {answer}."}, {"system_prompt": "Be exact."}], ids=["hint", "prompt"])
def test_a_teacher_that_is_told_more_is_compared_at_the_same_answers(
    tmp_path: Path, tiny_folder: Path, master: Path, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At both models' answers the teacher reads its hint, and the student does not."""
    calls: list[dict[str, Any]] = []

    def listen(student: Any, teacher: Any, **kwargs: Any) -> Any:
        calls.append({"models": (student, teacher), **kwargs})
        return check_teacher(student, teacher, **kwargs)

    monkeypatch.setattr(grading, "check_teacher", listen)
    teacher = {"name": str(master), "allow_worse": True, **told}
    [check] = run(settings(tmp_path, tiny_folder, teacher))
    [call] = calls
    student, other = call["models"]
    assert isinstance(student, SelfTeacher) and isinstance(other, InProcessTeacher)
    for who in ("teacher", "student"):
        plain, seen = call[f"{who}_trajectories"], call[f"{who}_views"]
        assert len(plain) == len(seen) == 8
        for a, b in zip(plain, seen, strict=True):
            assert a.num_tokens < b.num_tokens and a.spans[-1].token_ids == b.spans[-1].token_ids
            assert a.num_targets == b.num_targets > 0
        found = check[f"on_{who}_prefixes"]
        assert math.isfinite(found["forward_kl"]) and found["num_tokens"] == sum(t.num_targets for t in plain)
    # What is reported is what a teacher that reads its own prompt says.
    again = compare_prefixes(student, other, call["teacher_trajectories"], views=call["teacher_views"])
    same = compare_prefixes(student, other, call["teacher_trajectories"])
    assert again is not None and same is not None and again.forward_kl != pytest.approx(same.forward_kl, rel=1e-3)
