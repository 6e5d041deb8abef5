"""Two processes against one: the same steps, the same prompts, and a run that goes on with another number of them."""

import contextlib
import itertools
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
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
from model_server import ModelServer

from tutelage.data.store import TrajectoryStore
from tutelage.testing.tiny import tiny_model


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


def launched(processes: int, by: str) -> list[str]:
    """Python's arguments that start so many processes over gloo. `accelerate launch --cpu` would start one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if by == "torchrun":
        return ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    options = [f"--num_processes={processes}", f"--main_process_port={port}", "--num_machines=1"]
    return ["-m", "accelerate.commands.launch", "--multi_gpu", *options, "--mixed_precision=no", "--dynamo_backend=no"]


def start(processes: int, *arguments: str, by: str = "torchrun") -> subprocess.Popen:
    command = [sys.executable, *(launched(processes, by) if processes > 1 else []), "-m", "tutelage", *arguments]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen) -> int:
    out, _ = process.communicate(timeout=240)
    if process.returncode != 0:
        print(out.decode()[-3000:])
    return process.returncode


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kill_in_round(process: subprocess.Popen, run: Path, number: int) -> None:
    """SIGKILL to every process of a run that has begun to draw that round."""
    folder = run / "work" / f"stage0-round{number}"
    deadline = time.monotonic() + 200
    while not folder.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    agent = psutil.Process(process.pid)
    for each in [*agent.children(recursive=True), agent]:  # its workers are in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()
    assert not (run / "result.json").exists()


def assert_same_run(reference: Path, other: Path) -> None:
    """The same steps, prompts and completions, and the same model within what the order of additions leaves."""
    want, got = metrics(reference), metrics(other)
    assert [m["data/num_targets"] for m in got] == [m["data/num_targets"] for m in want]
    for name in ("train/loss", "train/grad_norm"):
        assert [m[name] for m in got] == pytest.approx([m[name] for m in want], rel=1e-5)
    first, again = (list(TrajectoryStore(r / "trajectories")) for r in (reference, other))
    assert [(t.id, t.task_id, t.token_ids) for t in again] == [(t.id, t.task_id, t.token_ids) for t in first]
    a, b = (load_file(r / "model" / "model.safetensors") for r in (reference, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def resolved(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())["resolved"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("one")
    assert finish(start(1, "train", str(settings(folder, tiny_folder, "one")))) == 0
    return folder / "one"


@pytest.mark.timeout(600)
def test_two_processes_make_the_steps_of_one_and_either_resumes_the_other(
    one: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    two = start(2, "train", str(settings(tmp_path, tiny_folder, "two")), by="accelerate")
    assert finish(two) == 0
    assert resolved(tmp_path / "two")["processes"] == 2
    cut = start(2, "train", str(settings(tmp_path, tiny_folder, "cut")))
    kill_in_round(cut, tmp_path / "cut", 1)
    assert finish(start(1, "resume", str(tmp_path / "cut"))) == 0
    for run in ("two", "cut"):
        assert_same_run(one, tmp_path / run)


@pytest.mark.timeout(600)
def test_sharded_weights_make_the_steps_of_one_and_are_resumed_whole(
    one: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    """FSDP2: killed in the second round under two processes, resumed by one; what it saves loads as it is."""
    path = settings(tmp_path, tiny_folder, "sharded")
    cut = start(2, "train", str(path), "distributed.sharding=full")
    kill_in_round(cut, tmp_path / "sharded", 1)
    assert resolved(tmp_path / "sharded")["sharding"] == "full"
    saved = sorted((tmp_path / "sharded" / "checkpoints").glob("step-*"))[-1] / "model"
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.dtype == torch.float32 and type(model).__name__ == "LlamaForCausalLM"
    assert finish(start(1, "resume", str(tmp_path / "sharded"))) == 0
    assert_same_run(one, tmp_path / "sharded")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_one_process_is_resumed_by_sharded_ones(tmp_path: Path, tiny_folder: Path, lora: bool) -> None:
    more = ["model.lora.r=4", "model.lora.alpha=8"] if lora else []
    path = settings(tmp_path, tiny_folder, "whole")
    assert finish(start(1, "train", str(path), *more)) == 0
    path = settings(tmp_path, tiny_folder, "cut")
    kill_in_round(start(1, "train", str(path), "distributed.sharding=full", *more), tmp_path / "cut", 1)
    assert finish(start(2, "resume", str(tmp_path / "cut"))) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_on_a_server_draw_and_train_as_one(tmp_path: Path, tiny_folder: Path, sharding: str) -> None:
    """The first process pushes (gathered and merged) weights, both ask; the server is restarted by others meanwhile."""
    more = ["rollout.engine=vllm", "model.lora.r=4", "model.lora.alpha=8", "rollout.server.requests=2", "gate=false"]
    loads = []
    for run, processes in (("alone", 1), ("both", 2)):
        with ModelServer(tiny_model(seed=9), str) as server:
            seen = itertools.count(1)
            if run == "both":
                server.before = lambda body, c=seen, s=server: s.restart() if next(c) == 60 else None
            path = settings(tmp_path, tiny_folder, run)
            options = [*more, f"rollout.url={server.url}", f"distributed.sharding={sharding}"]
            assert finish(start(processes, "train", str(path), *options)) == 0
            loads.append(server.loads)
    assert loads[0] == 2 and loads[1] >= 3
    assert_same_run(tmp_path / "alone", tmp_path / "both")
