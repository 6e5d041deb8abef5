"""What is written for another trainer: it must load there, and reward as the run's verifier does."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_job import job, rejection

torch.set_num_threads(1)


VERL: dict[str, Any] = {
    "data": {
        "train_files": str,
        "val_files": str,
        "prompt_key": str,
        "train_batch_size": int,
        "max_response_length": int,
    },
    "actor_rollout_ref": {
        "model": {"path": str},
        "actor": {
            "optim": {"lr": float},
            "ppo_mini_batch_size": int,
            "use_kl_loss": bool,
            "loss_agg_mode": str,
            "clip_ratio": float,
        },
        "rollout": {"n": int, "temperature": float, "top_p": (int, float)},
    },
    "algorithm": {"adv_estimator": str, "use_kl_in_reward": bool},
    "reward": {"custom_reward_function": {"path": (str, type(None)), "name": str}},
    "trainer": {"nnodes": int, "n_gpus_per_node": int, "logger": list},
}
"""Names and kinds in verl 0.9.1's config that the handover sets; the peer test below reads them from verl itself."""


def unknown_to(schema: Any, config: Any, path: str = "") -> list[str]:
    """Keys of a config that the schema has not, or whose values are of another kind."""
    if isinstance(schema, dict):
        if not isinstance(config, dict):
            return [path]
        found = [unknown_to(schema[k], v, f"{path}.{k}") if k in schema else [f"{path}.{k}"] for k, v in config.items()]
        return [f for part in found for f in part]
    return [] if isinstance(config, schema) else [path]


@pytest.mark.peer
def test_verl_has_every_key_that_the_handover_sets(tmp_path: Path, tiny_folder: Path) -> None:
    """Against the flattened trainer config inside the installed verl (`pip install --no-deps verl` is enough)."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("verl is not installed")
    path = Path(spec.submodule_search_locations[0]) / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    reference = yaml.safe_load(path.read_text())
    ours = yaml.safe_load((exported(tmp_path, tiny_folder) / "verl.yaml").read_text())
    assert unknown_to(VERL, ours) == []

    def check(known: Any, theirs: Any, where: str) -> None:
        for key, value in known.items():
            assert key in theirs, f"verl's config has no {where}{key}"
            if isinstance(value, dict):
                check(value, theirs[key], f"{where}{key}.")
            else:
                assert isinstance(theirs[key], value), f"{where}{key} is {theirs[key]!r} in verl"

    check(VERL, reference, "")


def exported(folder: Path, model: Path) -> Path:
    settings = rejection(folder, model, method="rejection_sampling", gate=False, evaluation=None, then="export")
    job({**settings, "rounds": 1})()
    return folder / "run" / "handover"


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_handover_loads_and_trains_in_trl_and_rewards_as_the_verifier(tmp_path: Path, tiny_folder: Path) -> None:
    folder = exported(tmp_path, tiny_folder)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and rows[0]["prompt"][-1]["role"] == "user"
    module = load(folder / "reward.py")
    texts = ["a", "b", "cc"]
    expected = [float(sum(map(ord, t)) % 3 == 0) for t in texts]
    chats = [[{"role": "assistant", "content": t}] for t in texts]
    assert module.reward([], chats, task=[r["task"] for r in rows[:3]]) == expected
    for row, text, want in zip(rows, texts, expected, strict=False):
        known = {"ground_truth": row["reward_model"]["ground_truth"], "extra_info": row["extra_info"]}
        assert module.compute_score(row["data_source"], text, **known) == want
    verl = yaml.safe_load((folder / "verl.yaml").read_text())
    assert verl["algorithm"]["adv_estimator"] == "grpo"
    assert verl["data"]["train_batch_size"] == verl["actor_rollout_ref"]["actor"]["ppo_mini_batch_size"] == 9
    held = [json.loads(line) for line in (folder / verl["data"]["val_files"]).read_text().splitlines()]
    assert len(held) == 3 and not {r["task"] for r in held} & {r["task"] for r in rows}
    assert unknown_to(VERL, verl) == []
    assert (folder / verl["actor_rollout_ref"]["model"]["path"] / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_trl_takes_a_step_from_the_handover(tmp_path: Path, tiny_folder: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    folder = exported(tmp_path, tiny_folder)
    body = yaml.safe_load((folder / "trl_grpo.yaml").read_text())
    options = {**body["config"], "output_dir": str(tmp_path / "out"), "max_steps": 1, "report_to": []}
    args = trl.GRPOConfig(**options, per_device_train_batch_size=4, use_cpu=True, bf16=False, save_strategy="no")
    trainer = trl.GRPOTrainer(
        model=str((folder / body["model"]).resolve()),
        reward_funcs=load(folder / "reward.py").reward,
        args=args,
        train_dataset=datasets.Dataset.from_json(str(folder / "prompts.jsonl"), cache_dir=str(tmp_path / "cache")),
    )
    trainer.train()
    assert trainer.state.global_step == 1
