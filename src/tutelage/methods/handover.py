"""After graduation: RL in the same run, or what another trainer needs to go on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from tutelage.errors import ConfigError
from tutelage.train.loop import Stage
from tutelage.train.run_directory import write_atomically
from tutelage.types import Task, Trajectory
from tutelage.verifiers import build_verifier

if TYPE_CHECKING:
    from tutelage.methods.config import RunConfig
    from tutelage.methods.workbench import Workbench

REWARD = '''"""The reward of this task. TRL: `reward`. verl: `compute_score`. Needs tutelage and verifier.json."""

from pathlib import Path

from tutelage.methods.handover import reward_functions

reward, compute_score = reward_functions(Path(__file__).parent)
'''


def following(settings: Any, bench: "Workbench") -> list[Stage]:
    """The RL stage of `then: rl`, carried out if the stage before it ends as `then_after` says."""
    if getattr(settings, "then", None) != "rl":
        return []
    from tutelage.methods import rl

    return [replace(rl.build(rl_settings(settings), bench), after=settings.then_after)]


def plan_of(config: "RunConfig", bench: "Workbench") -> list[tuple[Any, Stage]]:
    """Every stage with its settings, in order; `then: rl` adds the one that follows."""
    from tutelage.methods import METHODS

    out: list[tuple[Any, Stage]] = []
    for settings in config.stages:
        out.append((settings, METHODS[settings.method].build(settings, bench)))
        out += [(rl_settings(settings), stage) for stage in following(settings, bench)]
    return out


def rl_settings(settings: Any) -> Any:
    """Settings of the RL stage: its own, and the imitation stage's questions, verifier and rollout."""
    from tutelage.methods import rl

    shared = {name: getattr(settings, name).model_dump() for name in ("tasks", "verifier", "rollout")}
    shared["rollout"]["n"] = max(2, shared["rollout"]["n"])
    own = {"method": "grpo", "name": f"{settings.name}_rl", **settings.rl}
    for name in ("rollout", "verifier"):
        if isinstance(own.get(name), Mapping):
            own[name] = {**shared[name], **own[name]}
    try:
        return rl.PolicyGradientStage(**{**shared, **own})
    except ValidationError as error:
        raise ConfigError([f"rl.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]) from error


def export_handover(config: "RunConfig", root: Path, bench: "Workbench") -> Path | None:
    """RUN/handover for the last stage with `then: export`: prompts, held-out prompts, reward, and a config each for TRL
    and verl (0.9).

    The model is RUN/model, which is the checkpoint that graduation chose.
    """
    stage = next((s for s in reversed(config.stages) if getattr(s, "then", None) == "export"), None)
    if stage is None:
        return None
    folder = root / "handover"
    folder.mkdir(exist_ok=True)
    train, heldout = bench.train_tasks(stage.tasks), bench.heldout_tasks(stage.tasks)
    for name, tasks in (("prompts.jsonl", train), ("heldout.jsonl", heldout)):
        rows = [prompt_row(task, bench.config.model.system_prompt) for task in tasks]
        write_atomically(folder / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    kind, options = bench.verifier_options(stage.verifier)
    body = {"kind": kind, "options": options, "root": str(bench.folder.resolve())}
    write_atomically(folder / "verifier.json", json.dumps(body, indent=1))
    write_atomically(folder / "reward.py", REWARD)
    rollout, lr = stage.rollout, 1e-6
    trl = {
        "model": "../model",
        "dataset": "prompts.jsonl",
        "reward": "reward.py:reward",
        "config": {
            "output_dir": "trl-grpo",
            "learning_rate": lr,
            "num_generations": max(2, rollout.n),
            "max_completion_length": rollout.max_new_tokens,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "beta": 0.0,
            "epsilon": 0.2,
            "loss_type": "dapo",
            "mask_truncated_completions": True,
        },
    }
    write_atomically(folder / "trl_grpo.yaml", yaml.safe_dump(trl, sort_keys=False))
    verl = _verl(rollout, lr, num_prompts=len(train), has_heldout=bool(heldout))
    write_atomically(folder / "verl.yaml", yaml.safe_dump(verl, sort_keys=False))
    return folder


def _verl(rollout: Any, lr: float, *, num_prompts: int, has_heldout: bool) -> dict[str, Any]:
    """Overrides of verl's PPO trainer config, in the form of verl 0.9: the reward function stands under `reward`.

    A batch is no larger than the prompts there are, since verl drops a last smaller one.
    """
    batch = min(256, num_prompts)
    return {
        "data": {
            "train_files": "prompts.jsonl",
            "val_files": "heldout.jsonl" if has_heldout else "prompts.jsonl",
            "prompt_key": "prompt",
            "train_batch_size": batch,
            "max_response_length": rollout.max_new_tokens,
        },
        "actor_rollout_ref": {
            "model": {"path": "../model"},
            "actor": {
                "optim": {"lr": lr},
                "ppo_mini_batch_size": batch,
                "use_kl_loss": False,
                "loss_agg_mode": "token-mean",
                "clip_ratio": 0.2,
            },
            "rollout": {"n": max(2, rollout.n), "temperature": rollout.temperature, "top_p": rollout.top_p},
        },
        "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False},
        "reward": {"custom_reward_function": {"path": "reward.py", "name": "compute_score"}},
        "trainer": {"nnodes": 1, "n_gpus_per_node": 1, "logger": ["console"]},
    }


def prompt_row(task: Task, system: str | None = None) -> dict[str, Any]:
    """One line of prompts.jsonl: `prompt` as both trainers read it, and what the verifier needs as JSON text."""
    messages = [dict(m) for m in task.messages]
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    known = {"id": task.id, "answer": task.answer, "name": task.name, "metadata": dict(task.metadata)}
    return {
        "prompt": messages,
        "task": json.dumps(known, ensure_ascii=False, default=str),
        "data_source": task.name,
        "reward_model": {"style": "rule", "ground_truth": task.answer or ""},
        "extra_info": {"task": json.dumps(known, ensure_ascii=False, default=str)},
    }


def reward_functions(folder: Path) -> tuple[Callable[..., list[float | None]], Callable[..., float]]:
    """TRL's and verl's reward from a handover folder: 1 accepted, 0 rejected; an error is None (TRL) or 0 (verl).

    The verifier is started at the first call.
    """
    body = json.loads((folder / "verifier.json").read_text(encoding="utf-8"))
    made: list[Any] = []

    def judge(task: str, completion: str) -> float | None:
        if not made:
            made.append(build_verifier(body["kind"], body["options"], root=Path(body["root"])))
        known = json.loads(task)
        question = Task(
            id=known["id"],
            messages=(),
            answer=known["answer"],
            name=known["name"],
            metadata=known["metadata"],
        )
        said = Trajectory(id="completion", task_id=question.id, task_hash="", spans=(), completion=completion)
        verdict = made[0].judge(question, [said])[0]
        return None if verdict.status == "error" else float(verdict.is_accepted)

    def reward(prompts: Any, completions: Any, task: list[str], **_: Any) -> list[float | None]:
        texts = [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]
        return [judge(t, text) for t, text in zip(task, texts, strict=True)]

    def compute_score(
        data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None, **_: Any
    ) -> float:
        return judge(str((extra_info or {})["task"]), solution_str) or 0.0

    return reward, compute_score
