"""Runs on a real vLLM server, with SmolLM2: started and ended by the run, fed each round. Needs `make vllm-env`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tutelage.data.store import TrajectoryStore
from tutelage.errors import MissingExtra
from tutelage.methods.config import load_config
from tutelage.methods.job import Job
from tutelage.policies.load import load_model, load_tokenizer, save_model
from tutelage.policies.smollm2 import smollm2_path
from tutelage.policies.teachers import InProcessTeacher
from tutelage.policies.vllm_launch import vllm_python
from tutelage.policies.vllm_server import launch_server


def _missing() -> str | None:
    try:
        vllm_python()
        smollm2_path()
    except MissingExtra as e:
        return str(e)
    return None


pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(_missing() is not None, reason=f"no real vLLM server: {_missing()}"),
]
LAUNCH = {"max_model_len": 256, "env": {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}, "requests": 4}


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    (folder / "judge.py").write_text("def judge(task, completion, trajectory):\n    return True\n")
    questions = "".join(json.dumps({"question": f"What is {i} + {i}?", "answer": str(2 * i)}) + "\n" for i in range(4))
    (folder / "q.jsonl").write_text(questions)
    return {
        "run_dir": str(folder / "run"),
        "model": {"name": "smollm2-135m-instruct", "precision": "float32"},
        "tasks": {"kind": "jsonl", "path": str(folder / "q.jsonl")},
        "evaluation": None,
        "rounds": 2,
        **more,
    }


def started(body: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    config, folder = load_config(body)
    return Job(config, folder)()


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in found if e["event"] == kind]


def test_the_second_round_is_sampled_with_the_weights_of_the_first(tmp_path: Path) -> None:
    """Its log-probabilities are the trainer's to 0.01 nats; the base model's differ by many times that."""
    body = settings(
        tmp_path,
        method="rejection_sampling",
        verifier={
            "kind": "python",
            "function": f"{tmp_path / 'judge.py'}:judge",
            "allow_code_outside": True,
            "accept_truncated": True,
            "workers": 1,
        },
        rollout={"n": 2, "max_new_tokens": 12, "engine": "vllm", "server": LAUNCH},
        keep={"distinct": None, "drop_truncated": False},
        train={"lr": 3e-4, "batch_size": 4, "epochs": 2, "schedule": "constant", "warmup": 0.0},
        gate=False,
    )
    started(body)
    gaps = events(tmp_path / "run", "sampler_gap")
    print([(g["mean_abs_logprob_gap_nats"], g["max_abs_logprob_gap_nats"]) for g in gaps])
    assert [g["round"] for g in gaps] == [0, 1]
    assert all(g["mean_abs_logprob_gap_nats"] < 0.01 for g in gaps)
    second = [t for t in TrajectoryStore(tmp_path / "run" / "trajectories") if t.id.startswith("s0r1")]
    base = InProcessTeacher(load_model("smollm2-135m-instruct"), name="base")
    said = [[lp for s in t.spans if s.is_sampled for lp in (s.logprobs or ())] for t in second]
    stale = np.concatenate([np.abs(np.subtract(a, b)) for a, b in zip(said, base.score(second), strict=True)])
    print("stale gap", stale.mean())
    assert stale.mean() > 20 * gaps[1]["mean_abs_logprob_gap_nats"]
    me = psutil.Process()
    assert not [p for p in me.children(recursive=True) if "vllm" in " ".join(p.cmdline())]


def test_a_teacher_on_a_server_gives_the_losses_of_one_in_this_process(tmp_path: Path) -> None:
    body = settings(
        tmp_path,
        method="distill_on_policy",
        rollout={"n": 1, "max_new_tokens": 8, "prompts_per_round": 3},
        divergence={"kind": "reverse_kl", "estimator": "top_k_tail", "top_k": 32},
        train={"lr": 1e-4, "batch_size": None, "schedule": "constant", "warmup": 0.0},
    )
    body["model"] |= {"lora": {"r": 4, "alpha": 8}}
    generator = torch.Generator().manual_seed(0)
    model = load_model("smollm2-135m-instruct")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * p.std() * torch.randn(p.shape, generator=generator)
    save_model(model, load_tokenizer("smollm2-135m-instruct"), tmp_path / "teacher")
    teacher = {"name": str(tmp_path / "teacher"), "is_checked": False}
    started({**body, "teacher": teacher, "run_dir": str(tmp_path / "own")})
    options = {k: v for k, v in LAUNCH.items() if k != "requests"}
    with launch_server(
        tmp_path / "teacher", dtype="float32", max_logprobs=32, log=tmp_path / "log", **options
    ) as server:
        started({**body, "teacher": {**teacher, "url": server.url, "server": {"requests": 2}}})
    own, served = (
        [json.loads(line)["train/loss"] for line in (tmp_path / r / "metrics.jsonl").read_text().splitlines()]
        for r in ("own", "run")
    )
    print(own, served)
    assert min(own) > 0.1 and served == pytest.approx(own, rel=1e-2)
