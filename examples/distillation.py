"""Supervised against on-policy distillation at equal optimiser steps, on a real task, in minutes on a CPU.

    python examples/distillation.py [--out runs/distillation] [--layers 24 18] [--steps 30]

The task: sums of three one-digit terms (reasoning-gym's chain_sum), worked step by step. Teacher: SmolLM2-135M-Instruct
after SFT on worked solutions. Students: copies of SmolLM2 with some middle layers left out, after a little SFT on few of
the same solutions. Both distillations use the same questions, learning rate, batch and number of updates: supervised
(recorded gold solutions, forward KL) and on-policy (the student's own samples, reverse KL). The held-out questions are
in no training set. Prints accuracy with intervals, the ledger, and the gain ratio as GKD computes it: gain of
on-policy distillation over the student, divided by the gain of supervised distillation over the same student.

Folders that are finished are not computed again.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from tutelage.data.tasks import reasoning_gym_tasks
from tutelage.evals import EvalResult, compare
from tutelage.methods.config import load_config
from tutelage.methods.job import Job
from tutelage.policies.load import load_model, load_tokenizer, resolve_model, save_model

BASE = "smollm2-135m-instruct"
OPTIONS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
HELDOUT, TRAINING = 96, 384
TASKS = {"kind": "reasoning_gym", "name": "chain_sum", "options": OPTIONS, "heldout": HELDOUT, "size": TRAINING}
SYSTEM = "Show the steps."
VERIFIER = {"kind": "last_number"}
LENGTH = 40
EVALUATION = {"n": 8, "ks": [1, 8], "max_new_tokens": LENGTH, "controls": False}
DROPPED = {24: range(14, 20), 18: [*range(8, 14), *range(14, 20)]}


def worked(expression: str) -> str:
    """`7 + 2 - 4` -> `7 + 2 = 9, 9 - 4 = 5. The answer is 5.`"""
    first, *rest = expression.split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {result}")
        total = result
    return f"{', '.join(steps)}. The answer is {total}."


def demonstrations(path: Path, count: int) -> Path:
    """Worked solutions to the first `count` training questions."""
    loaded = reasoning_gym_tasks("chain_sum", TRAINING, split="train", config=OPTIONS, seed=0, heldout=HELDOUT)
    records = []
    for task in loaded.tasks[:count]:
        expression = task.metadata["reasoning_gym"]["entry"]["metadata"]["expression"]
        records.append({"messages": [*map(dict, task.messages), {"role": "assistant", "content": worked(expression)}]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def cut_down(layers: int, folder: Path) -> Path:
    """SmolLM2 without the middle layers that it misses least."""
    if (folder / "config.json").exists():
        return folder
    model = load_model(BASE, dtype="float32")
    kept = [i for i in range(30) if i not in DROPPED[layers]]
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(kept)
    model.config.layer_types = None
    save_model(model, load_tokenizer(resolve_model(BASE)[0]), folder)
    return folder


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """The run's result, from its folder where it is finished."""
    done = Path(settings["run_dir"]) / "result.json"
    if not done.exists():
        started = time.perf_counter()
        config, folder = load_config(settings)
        Job(config, folder, is_resume=(done.parent / "config.yaml").exists())()
        print(f"{done.parent.name}: {time.perf_counter() - started:.0f} s", flush=True)
    result: dict[str, Any] = json.loads(done.read_text())
    return result


def common(out: Path, model: str, data: Path, args: Any) -> dict[str, Any]:
    return {
        "run_dir": str(out),
        "seed": args.seed,
        "model": {"name": model, "system_prompt": SYSTEM, "precision": args.precision},
        "data": {"path": str(data)},
        "tasks": TASKS,
        "verifier": VERIFIER,
        "evaluation": EVALUATION,
        "saving": {"every_minutes": 30, "keep": 1},
    }


def sft(out: Path, model: str, data: Path, args: Any, **train: Any) -> dict[str, Any]:
    train = {"schedule": "linear", "batch_size": 16, **train}
    return run({"method": "sft", "train": train, **common(out, model, data, args)})


def distil(out: Path, student: Path, teacher: Path, data: Path, *, on_policy: bool, args: Any) -> dict[str, Any]:
    """One update a round on 16 questions. Supervised: the recorded solutions, forward KL; on-policy: reverse KL."""
    if not out.exists():  # the student was measured at the end of its SFT: not again
        (out / "evaluation").mkdir(parents=True)
        shutil.copy(student / "evaluation" / "after.json", out / "evaluation" / "before.json")
    return run(
        {
            "method": "distill_on_policy",
            "teacher": {"name": str(teacher / "model"), "is_checked": on_policy},
            "student_share": 1.0 if on_policy else 0.0,
            "rollout": {"n": 1, "max_new_tokens": LENGTH, "prompts_per_round": 16},
            "divergence": {"kind": "reverse_kl" if on_policy else "forward_kl"},
            "train": {"batch_size": None, "lr": args.lr, "schedule": "constant", "warmup": 0.0},
            "rounds": args.steps,
            **common(out, str(student / "model"), data, args),
        }
    )


def evaluation(folder: Path) -> EvalResult:
    return EvalResult.from_json(json.loads((folder / "evaluation" / "after.json").read_text()))


def shown(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.3f} [{metric['ci95'][0]:.3f}, {metric['ci95'][1]:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 18])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--student-demos", type=int, default=96)
    parser.add_argument("--student-epochs", type=int, default=3)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    teacher_data = demonstrations(args.out / "worked.jsonl", TRAINING)
    few = demonstrations(args.out / "few.jsonl", args.student_demos)
    r = sft(args.out / "teacher", BASE, teacher_data, args, lr=1e-4, epochs=args.teacher_epochs)
    print("teacher", shown(r["after"]["pass@1"]), r["after"]["greedy"], r["times_s"], flush=True)
    for layers in args.layers:
        small = BASE if layers == 30 else str(cut_down(layers, args.out / f"cut{layers}"))
        r = sft(args.out / f"student{layers}", small, few, args, lr=2e-4, epochs=args.student_epochs)
        print(layers, shown(r["after"]["pass@1"]), shown(r["after"]["greedy"]), r["times_s"], flush=True)
        if args.only == "sft":
            continue
        for name, on in (("supervised", False), ("on_policy", True)):
            out = args.out / f"{name}{layers}"
            r = distil(out, args.out / f"student{layers}", args.out / "teacher", teacher_data, on_policy=on, args=args)
            print(layers, name, shown(r["after"]["pass@1"]), shown(r["after"]["greedy"]), r["gain"], r["times_s"], flush=True)
            print(r["ledger"], flush=True)


if __name__ == "__main__":
    main()
