"""Supervised against on-policy distillation at equal optimiser steps, on a real task, on a CPU.

    python examples/distillation.py [--out runs/distillation] [--layers 24 20] [--steps 30]

The task: sums of three one-digit terms (reasoning-gym's chain_sum), worked step by step. Teacher: SmolLM2-135M-Instruct
after SFT on 384 worked solutions. Students: copies of SmolLM2 without some middle layers, after SFT on 160 of them.
Both distillations start from the same student and use the same 160 questions, learning rate, batch and number of
updates: supervised (the recorded solutions, forward KL) and on-policy (the student's own samples, reverse KL). The
held-out questions are in no training set. Prints accuracy with intervals, the ledger, and the gain ratio as GKD has it:
gain of on-policy distillation over the student, divided by the gain of supervised distillation over the same student.

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
EVALUATION = {"n": 4, "ks": [1, 4], "max_new_tokens": LENGTH, "controls": False}
DROPPED = {24: range(14, 20), 20: [*range(8, 12), *range(14, 20)], 16: [*range(6, 20)]}


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


def common(out: Path, model: str, data: Path, args: Any, *, is_measured: bool = True) -> dict[str, Any]:
    return {
        "run_dir": str(out),
        "seed": args.seed,
        "model": {"name": model, "system_prompt": SYSTEM},
        "data": {"path": str(data)},
        "tasks": TASKS,
        "verifier": VERIFIER,
        "evaluation": EVALUATION if is_measured else None,
        "saving": {"every_minutes": 30, "keep": 1},
    }


def sft(out: Path, model: str, data: Path, args: Any, **more: Any) -> dict[str, Any]:
    train = {"schedule": "linear", "batch_size": 16, "lr": more.pop("lr"), "epochs": more.pop("epochs")}
    return run({"method": "sft", "train": train, **common(out, model, data, args, **more)})


def distil(out: Path, student: Path, teacher: Path, data: Path, *, kind: str, args: Any) -> dict[str, Any]:
    """One update a round on 16 questions: on recorded solutions (kind "supervised"), or on the student's samples."""
    is_on_policy = kind != "supervised"
    first = out.parent / f"{student.name}-supervised" / "evaluation" / "before.json"
    if is_on_policy and first.exists() and not out.exists():  # the same student: it is measured once
        (out / "evaluation").mkdir(parents=True)
        shutil.copy(first, out / "evaluation" / "before.json")
    return run(
        {
            "method": "distill_on_policy",
            "teacher": {"name": str(teacher / "model"), "is_checked": not is_on_policy},
            "student_share": 1.0 if is_on_policy else 0.0,
            "rollout": {"n": 1, "max_new_tokens": LENGTH, "prompts_per_round": 16},
            "divergence": {"kind": kind if is_on_policy else "forward_kl"},
            "train": {"batch_size": None, "lr": args.lr, "schedule": "constant", "warmup": 0.0},
            "rounds": args.steps,
            **common(out, str(student / "model"), data, args),
            "tasks": {**TASKS, "size": args.demos},
        }
    )


def shown(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.3f} [{metric['ci95'][0]:.3f}, {metric['ci95'][1]:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 20])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--demos", type=int, default=160)
    parser.add_argument("--student-epochs", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["supervised", "reverse_kl"])
    args = parser.parse_args()
    everything = demonstrations(args.out / "worked.jsonl", TRAINING)
    few = demonstrations(args.out / "few.jsonl", args.demos)
    r = sft(args.out / "teacher", BASE, everything, args, lr=1e-4, epochs=args.teacher_epochs)
    print("teacher", shown(r["after"]["pass@1"]), r["after"]["greedy"], r["times_s"], flush=True)
    for layers in args.layers:
        student = args.out / f"student{layers}"
        small = str(cut_down(layers, args.out / f"cut{layers}"))
        sft(student, small, few, args, lr=2e-4, epochs=args.student_epochs, is_measured=False)
        for kind in args.kinds:
            r = distil(args.out / f"{student.name}-{kind}", student, args.out / "teacher", few, kind=kind, args=args)
            for m in ("pass@1", "greedy"):
                print(layers, kind, m, shown(r["before"][m]), shown(r["after"][m]), r["gains"][m], flush=True)
            print(r["ledger"]["shares"], r["times_s"], flush=True)


if __name__ == "__main__":
    main()
