"""Whole runs on a tiny model: from a config to `result.json`, stopped, killed and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tutelage.errors import ConfigError, DataError, Interrupted
from tutelage.methods.config import load_config
from tutelage.methods.job import Job
from tutelage.train.stop import StopRequest

torch.set_num_threads(1)


def questions(path: Path, count: int = 12) -> Path:
    path.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(count)))
    return path


def verifier(folder: Path) -> None:
    (folder / "judge.py").write_text(
        "def judge(task, completion, trajectory):\n"
        "    return {'accepted': sum(map(ord, completion)) % 3 == 0, 'score': len(completion) % 7 / 7}\n"
    )


def rejection(folder: Path, model: Path, run: str, **more: Any) -> dict[str, Any]:
    verifier(folder)
    questions(folder / "q.jsonl")
    return {
        "method": "rejection_sampling",
        "run_dir": str(folder / run),
        "model": {"name": str(model), "precision": "float32"},
        "tasks": {"kind": "jsonl", "path": str(folder / "q.jsonl"), "heldout": 3},
        "verifier": {"kind": "python", "function": f"{folder / 'judge.py'}:judge", "allow_code_outside": True},
        "rollout": {"n": 4, "max_new_tokens": 6, "chunk_rows": 8},
        "keep": {"distinct": None, "cap": None},
        "train": {"lr": 1e-3, "batch_size": 4, "epochs": 1},
        "rounds": 2,
        "evaluation": {"n": 2, "ks": [1, 2], "controls": False},
        "verifier.accept_truncated": True,
    } | more


def job(settings: dict[str, Any], **kwargs: Any) -> Job:
    dotted = {k: v for k, v in settings.items() if "." in k}
    config, folder = load_config({k: v for k, v in settings.items() if "." not in k}, dotted)
    return Job(config, folder, **kwargs)


def test_rejection_sampling_from_config_to_result(tmp_path: Path, tiny_folder: Path) -> None:
    settings = rejection(tmp_path, tiny_folder, "run") | {"keep": {"distinct": None, "cap": None}}
    result = job(settings)()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
    for side in ("before", "after"):
        assert set(result[side]["pass@1"]) >= {"value", "ci95", "chance"}
    assert len(result["gain"]["ci95"]) == 2
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    moved = [float((a - b).abs().max()) for a, b in zip(trained.parameters(), base.parameters(), strict=True)]
    assert max(moved) > 1e-4
