"""`docs/known-defects.md` names tests that exist; and the defects that have no better home."""

import re
from pathlib import Path

import torch

from tutelage.methods.config import load_config
from tutelage.methods.job import Job
from tutelage.policies.policy import Policy, add_lora, merged_copy
from tutelage.testing.tiny import tiny_model

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/known-defects.md").read_text()))
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^\s*def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 60
    assert named - defined == set()


def test_fewer_rows_than_a_batch_are_still_trained(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"prompt": "say 1", "completion": "one it is"}\n')
    settings = {
        "method": "sft",
        "run_dir": str(tmp_path / "run"),
        "model": {"name": str(tiny_folder), "precision": "float32"},
        "data": {"path": str(tmp_path / "chat.jsonl")},
        "train": {"lr": 1e-2, "batch_size": 64, "epochs": 3, "schedule": "constant", "warmup": 0.0},
    }
    config, folder = load_config(settings)
    Job(config, folder)()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3


def test_folding_adapters_leaves_the_trained_model_as_it_was() -> None:
    model = tiny_model(seed=0).to(torch.bfloat16)
    policy = Policy(add_lora(model, r=4, alpha=8, dropout=0.0, target="all-linear", seed=0))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    folded = [merged_copy(policy.model).state_dict() for _ in range(3)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    assert all(torch.equal(folded[0][name], folded[2][name]) for name in folded[0])
    plain = tiny_model(seed=0).to(torch.bfloat16).state_dict()
    moved = {name for name in folded[0] if not torch.equal(folded[0][name], plain[name])}
    assert moved and all("proj" in name for name in moved)
