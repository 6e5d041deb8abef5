"""Runs whose student, or teacher, is sampled by a server: weights pushed each round, a dying server, what is kept."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
from model_server import ModelServer

from tutelage.data.store import TrajectoryStore
from tutelage.errors import ConfigError, Interrupted, NumericsError
from tutelage.methods.config import load_config
from tutelage.methods.job import Job, config_of
from tutelage.methods.rollouts import Rollouts
from tutelage.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from tutelage.types import Trajectory

torch.set_num_threads(1)
FAST = {"attempts": 1, "revive_s": 0.2, "requests": 2}


@pytest.fixture
def server() -> Iterator[ModelServer]:
    """Serves other weights than the student's until it is given these."""
    with ModelServer(tiny_model(seed=9), tiny_tokenizer().decode) as found:
        yield found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher") / "teacher", seed=5)


def settings(folder: Path, student: Path, url: str, run: str = "run", **more: Any) -> dict[str, Any]:
    (folder / "judge.py").write_text("def judge(task, completion, trajectory):\n    return len(completion) % 2 == 0\n")
    questions = "".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(6))
    (folder / "q.jsonl").write_text(questions)
    return {
        "method": "rejection_sampling",
        "run_dir": str(folder / run),
        "model": {"name": str(student), "precision": "float32"},
        "tasks": {"kind": "jsonl", "path": str(folder / "q.jsonl")},
        "verifier": {
            "kind": "python",
            "function": f"{folder / 'judge.py'}:judge",
            "allow_code_outside": True,
            "accept_truncated": True,
            "options": {"isolate": False},
            "workers": 1,
        },
        "rollout": {"n": 4, "max_new_tokens": 5, "chunk_rows": 8, "engine": "vllm", "url": url, "server": FAST},
        "keep": {"distinct": None, "cap": None, "drop_truncated": False},
        "train": {"lr": 1e-2, "batch_size": 6, "epochs": 1},
        "gate": False,
        "evaluation": None,
        "rounds": 3,
        **more,
    }


def started(body: dict[str, Any]) -> dict[str, Any]:
    config, folder = load_config(body)
    return Job(config, folder)()


def resumed(run: Path) -> dict[str, Any]:
    config, folder = config_of(run)
    return Job(config, folder, is_resume=True)()


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in found if e["event"] == kind]


def drawn(run: Path) -> list[Trajectory]:
    return sorted(TrajectoryStore(run / "trajectories"), key=lambda t: t.id)


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_every_round_is_sampled_with_the_weights_just_trained(
    tmp_path: Path, tiny_folder: Path, server: ModelServer, lora: dict[str, Any] | None
) -> None:
    """The server's log-probabilities are the trainer's own, in every round, and nothing of a push is left on disk."""
    model = {"name": str(tiny_folder), "precision": "float32", "lora": lora}
    started(settings(tmp_path, tiny_folder, server.url, model=model))
    gaps = events(tmp_path / "run", "sampler_gap")
    assert [g["round"] for g in gaps] == [0, 1, 2] and server.loads == 3
    assert all(g["max_abs_logprob_gap_nats"] < 1e-4 for g in gaps)
    assert {s.policy_version for t in drawn(tmp_path / "run") for s in t.spans if s.is_sampled} == {
        f"stage0-step{m}" for m in (0, *[e["step"] for e in last_steps(tmp_path / "run")][:2])
    }
    assert not list((tmp_path / "run" / "serving").glob("*"))


def last_steps(run: Path) -> list[dict[str, Any]]:
    """The last metrics of each round."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return list({m["round"]: m for m in lines}.values())


def test_a_server_that_keeps_its_old_weights_stops_the_run(
    tmp_path: Path, tiny_folder: Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = Rollouts.sync
    monkeypatch.setattr(Rollouts, "sync", lambda self, v: push(self, v) if self.student.num_changes == 0 else None)
    with pytest.raises(NumericsError, match="sampler and trainer must agree"):
        started(settings(tmp_path, tiny_folder, server.url, train={"lr": 1.0, "batch_size": 6}))
    assert server.loads == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run whose server never fails."""
    folder = tmp_path_factory.mktemp("whole")
    with ModelServer(tiny_model(seed=9), tiny_tokenizer().decode) as server:
        started(settings(folder, tiny_folder, server.url, "whole"))
        assert len(server.bodies) == 3 * 24
    return folder / "whole"


@pytest.mark.parametrize("fault", ["drop", "cut", "restart"])
def test_a_passing_fault_changes_nothing(
    tmp_path: Path, tiny_folder: Path, whole: Path, server: ModelServer, fault: Any
) -> None:
    """Also where the server was restarted by others meanwhile, and came back with its first weights."""
    count, seen = 3 * 24, 0

    def before(body: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == count // 2:
            server.restart() if fault == "restart" else server.faults.append(fault)

    server.before = before
    started(settings(tmp_path, tiny_folder, server.url, "faulty"))
    assert seen > count // 2
    assert [t.token_ids for t in drawn(tmp_path / "faulty")] == [t.token_ids for t in drawn(whole)]


def test_a_server_that_dies_in_a_round_stops_the_run_which_goes_on_when_it_is_back(
    tmp_path: Path, tiny_folder: Path, whole: Path, server: ModelServer
) -> None:
    def before(body: Any) -> None:
        if len(server.bodies) > 24 + 10:  # in the second chunk of the second round
            server.always = "drop"

    server.before = before
    with pytest.raises(Interrupted, match="The state is saved"):
        started(settings(tmp_path, tiny_folder, server.url, "cut"))
    (event,) = events(tmp_path / "cut", "cut_short")
    assert event["round"] == 1 and "none of 1 servers answers" in event["why"]
    server.before, server.always = lambda body: None, None
    server.restart()
    again = len(server.bodies)
    resumed(tmp_path / "cut")
    assert len(server.bodies) - again == 2 * 24 - 8  # what its first chunk held is not asked again
    want, cut = drawn(whole), drawn(tmp_path / "cut")
    assert [(t.id, t.task_id, t.token_ids) for t in cut] == [(t.id, t.task_id, t.token_ids) for t in want]
    assert last_steps(tmp_path / "cut")[-1]["train/loss"] == last_steps(whole)[-1]["train/loss"]


@pytest.mark.parametrize(
    "divergence",
    [{"kind": "reverse_kl", "estimator": "top_k_tail", "top_k": 16}, {"kind": "sampled_reverse_kl"}],
    ids=lambda d: d["kind"],
)
def test_teacher_and_student_on_servers_distil_as_in_process(
    tmp_path: Path, tiny_folder: Path, teacher: Path, server: ModelServer, divergence: dict[str, Any]
) -> None:
    """The same draws, and the losses of a teacher in this process."""
    body = settings(tmp_path, tiny_folder, server.url, method="distill_on_policy", divergence=divergence)
    for name in ("keep", "gate", "verifier"):
        del body[name]
    body["rollout"] |= {"n": 2, "prompts_per_round": 3}
    body["train"] |= {"batch_size": None, "schedule": "constant"}
    with ModelServer(tiny_model(seed=5), tiny_tokenizer().decode) as graded:
        served = {"name": str(teacher), "url": graded.url, "is_checked": False, "server": FAST}
        result = started({**body, "teacher": served})
        asked = len(graded.bodies)
    started({**body, "run_dir": str(tmp_path / "own"), "teacher": {"name": str(teacher), "is_checked": False}})
    assert asked == 3 * 6 and result["ledger"]["flops"]["teacher"] > 0
    for run, other in zip(last_steps(tmp_path / "run"), last_steps(tmp_path / "own"), strict=True):
        assert run["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
    assert [t.token_ids for t in drawn(tmp_path / "run")] == [t.token_ids for t in drawn(tmp_path / "own")]


def test_a_teacher_on_a_server_answers_and_is_checked(
    tmp_path: Path, tiny_folder: Path, teacher: Path, server: ModelServer
) -> None:
    """Sequence-level distillation from its answers; its score is measured on the server too."""
    body = settings(tmp_path, tiny_folder, "", method="distill_off_policy", divergence=None)
    del body["gate"], body["rounds"]
    body["rollout"] = {"n": 2, "max_new_tokens": 5}
    body["tasks"] |= {"heldout": 2}
    body["evaluation"] = {"n": 2, "ks": [1], "controls": False}
    body["teacher"] = {"name": str(teacher), "url": server.url, "allow_worse": True, "server": FAST}
    started(body)
    (check,) = events(tmp_path / "run", "teacher_check")
    assert check["on_student_prefixes"] is None and check["pass@1"]["teacher"] is not None
    assert {s.author for t in drawn(tmp_path / "run") for s in t.spans if s.is_sampled} == {str(teacher)}
    assert len(server.bodies) == 2 * 2 + 4 * 2 and server.loads == 0


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    body = settings(tmp_path, tiny_folder, "http://127.0.0.1:1")
    body["rollout"]["engine"] = "inprocess"
    with pytest.raises(ConfigError, match=r"rollout\.url is set and rollout\.engine is inprocess"):
        load_config(body)
    body = settings(tmp_path, tiny_folder, "http://127.0.0.1:1", method="distill_on_policy")
    body["teacher"] = {"name": "average", "url": "http://127.0.0.1:1"}
    with pytest.raises(ConfigError, match=r"teacher\.url"):
        load_config(body)
