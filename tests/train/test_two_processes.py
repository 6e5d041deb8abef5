"""Two processes against one: the same steps, the same prompts, and a run that goes on with another number of them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tutelage.data.store import TrajectoryStore


def settings(folder: Path, model: Path, run: str) -> Path:
    (folder / "judge.py").write_text("def judge(task, completion, trajectory):\n    return len(completion) % 2 == 0\n")
    questions = "".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(10))
    (folder / "q.jsonl").write_text(questions)
    config = {
        "method": "rejection_sampling",
        "run_dir": str(folder / run),
        "model": {"name": str(model), "precision": "float32"},
        "tasks": {"kind": "jsonl", "path": "q.jsonl"},
        "verifier": {"kind": "python", "function": "judge.py:judge", "accept_truncated": True, "workers": 1},
        "rollout": {"n": 4, "max_new_tokens": 6, "chunk_rows": 8},
        "keep": {"distinct": None, "cap": None, "drop_truncated": False},
        "train": {"lr": 1e-3, "batch_size": 6, "epochs": 1, "max_tokens": 48, "optimizer": "sgd"},
        "saving": {"every_steps": 1, "keep": 3},
        "evaluation": None,
        "rounds": 2,
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(processes: int, *arguments: str) -> subprocess.Popen:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tutelage", *arguments]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen) -> int:
    out, _ = process.communicate(timeout=240)
    if process.returncode != 0:
        print(out.decode()[-3000:])
    return process.returncode


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_two_processes_make_the_steps_of_one_and_either_resumes_the_other(tmp_path: Path, tiny_folder: Path) -> None:
    one = start(1, "train", str(settings(tmp_path, tiny_folder, "one")))
    assert finish(one) == 0
    two = start(2, "train", str(settings(tmp_path, tiny_folder, "two")))
    assert finish(two) == 0
    cut = start(2, "train", str(settings(tmp_path, tiny_folder, "cut")))
    second_round = tmp_path / "cut" / "work" / "stage0-round1"
    deadline = time.monotonic() + 200
    while not second_round.exists() and cut.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    launcher = psutil.Process(cut.pid)
    for process in [*launcher.children(recursive=True), launcher]:  # its workers are in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    cut.communicate()
    assert not (tmp_path / "cut" / "result.json").exists()
    assert finish(start(1, "resume", str(tmp_path / "cut"))) == 0

    reference = metrics(tmp_path / "one")
    assert yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())["resolved"]["processes"] == 2
    first = list(TrajectoryStore(tmp_path / "one" / "trajectories"))
    for run in ("two", "cut"):
        other = metrics(tmp_path / run)
        assert [m["data/num_targets"] for m in other] == [m["data/num_targets"] for m in reference]
        for name in ("train/loss", "train/grad_norm"):
            assert [m[name] for m in other] == pytest.approx([m[name] for m in reference], rel=1e-5)
        again = list(TrajectoryStore(tmp_path / run / "trajectories"))
        assert [(t.id, t.task_id, t.token_ids) for t in again] == [(t.id, t.task_id, t.token_ids) for t in first]
        a, b = (load_file(tmp_path / r / "model" / "model.safetensors") for r in ("one", run))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
