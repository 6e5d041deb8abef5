"""Supervised against on-policy distillation at equal optimiser steps, on a real task, in minutes on a CPU.

    python examples/distillation.py [--out runs/distillation] [--steps 40]

Teacher: SmolLM2-135M-Instruct after SFT on 123 one-digit sums (reasoning-gym's chain_sum). Student: a copy of it with
fewer layers, after a little SFT on the same questions. Both distillations use the same questions, learning rate, batch
and number of updates: supervised (recorded gold answers, forward KL) and on-policy (the student's own samples, reverse
KL). The held-out 77 sums are in no training set. Prints accuracy with intervals, the ledger, and the gain ratio as GKD
computes it: gain of on-policy distillation over the student, divided by the gain of supervised distillation.

Folders that are finished are not computed again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tutelage.data.tasks import reasoning_gym_tasks
from tutelage.methods.config import load_config
from tutelage.methods.job import Job
from tutelage.policies.load import load_model, load_tokenizer, resolve_model, save_model

OPTIONS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TASKS = {
    "kind": "reasoning_gym",
    "name": "chain_sum",
    "options": OPTIONS,
    "canonical": "commutative_terms",
    "heldout": 77,
}
VERIFIER = {"kind": "last_number"}
EVALUATION = {"n": 8, "ks": [1, 8], "max_new_tokens": 16, "controls": False}
BASE = "smollm2-135m-instruct"


def demonstrations(path: Path, count: int | None = None) -> Path:
    """Gold answers to the training questions as one sentence."""
    loaded = reasoning_gym_tasks(
        "chain_sum", None, split="train", config=OPTIONS, seed=0, heldout=77, canonical="commutative_terms"
    )
    records = [
        {"messages": [*map(dict, t.messages), {"role": "assistant", "content": f"The answer is {t.answer}."}]}
        for t in loaded.tasks[:count]
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def cut_down(layers: int, folder: Path) -> Path:
    """SmolLM2 with `layers` of its 30 layers: the first and the last ones, the middle left out.

    Its activations are far from any trained model's, too far for bfloat16: it is trained in float32.
    """
    if (folder / "config.json").exists():
        return folder
    model = load_model(BASE, dtype="float32")
    kept = [*range(layers - layers // 3), *range(30 - layers // 3, 30)]
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = layers
    model.config.layer_types = None
    save_model(model, load_tokenizer(resolve_model(BASE)[0]), folder)
    return folder


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """The run's result, from its folder where it is finished."""
    done = Path(settings["run_dir"]) / "result.json"
    if not done.exists():
        config, folder = load_config(settings)
        Job(config, folder, is_resume=(done.parent / "config.yaml").exists())()
    result: dict[str, Any] = json.loads(done.read_text())
    return result


def sft(out: Path, model: str, data: Path, precision: str = "auto", **train: Any) -> dict[str, Any]:
    return run(
        {
            "method": "sft",
            "run_dir": str(out),
            "model": {"name": model, "precision": precision},
            "data": {"path": str(data)},
            "tasks": TASKS,
            "verifier": VERIFIER,
            "evaluation": EVALUATION,
            "train": {"schedule": "linear", **train},
        }
    )


def distil(out: Path, student: str, teacher: str, data: Path, *, on_policy: bool, args: Any) -> dict[str, Any]:
    """One update a round on 16 questions. Supervised: the recorded answers, forward KL; on-policy: reverse KL."""
    return run(
        {
            "method": "distill_on_policy",
            "run_dir": str(out),
            "model": {"name": student, "precision": "float32"},
            "teacher": {"name": teacher},
            "tasks": TASKS,
            "verifier": VERIFIER,
            "data": {"path": str(data)},
            "student_share": 1.0 if on_policy else 0.0,
            "rollout": {"n": 1, "max_new_tokens": 16, "prompts_per_round": 16},
            "divergence": {"kind": "reverse_kl" if on_policy else "forward_kl"},
            "train": {"batch_size": None, "lr": args.lr, "schedule": "constant", "warmup": 0.0},
            "rounds": args.steps,
            "evaluation": EVALUATION,
        }
    )


def shown(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.3f} [{metric['ci95'][0]:.3f}, {metric['ci95'][1]:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--student-epochs", type=int, default=3)
    args = parser.parse_args()
    data = demonstrations(args.out / "gold.jsonl")
    teacher = sft(args.out / "teacher", BASE, data, lr=1e-4, batch_size=8, epochs=args.teacher_epochs)
    small = cut_down(args.layers, args.out / "cut")
    student = sft(args.out / "student", str(small), data, "float32", lr=2e-4, batch_size=8, epochs=args.student_epochs)
    start, guide = str(args.out / "student" / "model"), str(args.out / "teacher" / "model")
    off = distil(args.out / "supervised", start, guide, data, on_policy=False, args=args)
    on = distil(args.out / "on_policy", start, guide, data, on_policy=True, args=args)
    print(f"teacher (30 layers)        pass@1 {shown(teacher['after']['pass@1'])}")
    print(f"student ({args.layers} layers)        pass@1 {shown(student['after']['pass@1'])}")
    for name, result in (("supervised, forward KL", off), ("on-policy, reverse KL", on)):
        gain, ledger = result["gain"], result["ledger"]
        shares = ", ".join(f"{k} {v:.0%}" for k, v in ledger["shares"].items() if v)
        print(f"{name:26} pass@1 {shown(result['after']['pass@1'])}  greedy {shown(result['after']['greedy'])}")
        print(f"{'':26} gain {gain['value']:+.3f} [{gain['ci95'][0]:+.3f}, {gain['ci95'][1]:+.3f}]")
        print(f"{'':26} {result['counts']['steps']} updates, {ledger['flops']['total']:.2e} operations ({shares})")
    ratio = on["gain"]["value"] / off["gain"]["value"] if off["gain"]["value"] > 0 else float("nan")
    print(f"gain ratio, on-policy / supervised: {ratio:.2f}")


if __name__ == "__main__":
    main()
