"""Supervised against on-policy distillation at equal optimiser steps, on a real task, on a CPU.

    python examples/distillation.py [--out runs/distillation] [--layers 24 20] [--steps 30]

The task: sums of three one-digit terms (reasoning-gym's chain_sum), worked step by step. Teacher: SmolLM2-135M-Instruct
after SFT on 384 worked solutions. Students: copies of SmolLM2 without some middle layers, after SFT on 160 of them.
Both distillations start from the same student and use the same 160 questions, learning rate, batch and number of
updates: supervised (the recorded solutions, forward KL) and on-policy (the student's own samples, reverse KL). The
held-out questions are in no training set. Prints accuracy with intervals, the ledger, and the gain ratio as GKD has it:
gain of on-policy distillation over the student, divided by the gain of supervised distillation over the same student.

Folders that are finished are not computed again. `--layers` without a number makes the teacher only, for the YAML
examples of distillation.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from tutelage.data.tasks import reasoning_gym_tasks
from tutelage.evals import EvalResult
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
            "tasks": {**TASKS, "size": args.questions},
        }
    )


def gains(folder: Path) -> dict[str, float]:
    """Question -> what the run added to its pass@1."""
    before, after = (
        EvalResult.from_json(json.loads((folder / "evaluation" / f"{name}.json").read_text())).by_task("pass@1")
        for name in ("before", "after")
    )
    return {question: after[question] - before[question] for question in before}


def ratio_of_gains(on_policy: Path, supervised: Path, *, resamples: int = 10_000) -> tuple[float, float, float]:
    """GKD's figure, mean gain on-policy / mean gain supervised, and its 95% interval: questions drawn anew, paired.

    Where the supervised gain may be 0 the ratio has no upper end, and its interval says so.
    """
    on, off = gains(on_policy), gains(supervised)
    pairs = np.array([[on[q], off[q]] for q in sorted(on)])
    rng = np.random.default_rng(0)
    means = pairs[rng.integers(len(pairs), size=(resamples, len(pairs)))].mean(1)
    ratios = np.where(means[:, 1] > 0, means[:, 0] / np.maximum(means[:, 1], 1e-12), np.inf)
    low, high = np.percentile(ratios, [2.5, 97.5], method="nearest")
    first = pairs.mean(0)
    return (float(first[0] / first[1]) if first[1] > 0 else float("nan")), float(low), float(high)


def difference(on_policy: Path, supervised: Path, *, resamples: int = 10_000) -> tuple[float, float, float]:
    """Gain on-policy minus gain supervised, with its 95% interval over questions, paired."""
    on, off = gains(on_policy), gains(supervised)
    each = np.array([on[q] - off[q] for q in sorted(on)])
    rng = np.random.default_rng(0)
    means = each[rng.integers(len(each), size=(resamples, len(each)))].mean(1)
    return float(each.mean()), *(float(x) for x in np.percentile(means, [2.5, 97.5]))


def shown(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.3f} [{metric['ci95'][0]:.3f}, {metric['ci95'][1]:.3f}]"


def report(name: str, result: dict[str, Any]) -> None:
    gain, ledger = result["gain"], result["ledger"]
    shares = ", ".join(f"{k} {v:.0%}" for k, v in ledger["shares"].items() if v)
    print(f"{name:24} pass@1 {shown(result['after']['pass@1'])}  greedy {shown(result['after']['greedy'])}")
    print(f"{'':24} gain {gain['value']:+.3f} [{gain['ci95'][0]:+.3f}, {gain['ci95'][1]:+.3f}]")
    print(f"{'':24} {result['counts']['steps']} updates, {ledger['flops']['total']:.2e} operations ({shares})")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--layers", type=int, nargs="*", default=[24, 20], help="of the students; none: teacher only")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--demos", type=int, default=160, help="solutions that the student is fine-tuned on first")
    parser.add_argument("--questions", type=int, help="questions of both distillations; the same where not given")
    parser.add_argument("--student-epochs", type=int, default=3)
    parser.add_argument("--divergence", default="reverse_kl", help="of the on-policy arm")
    args = parser.parse_args()
    disable_progress_bar()  # transformers' own: one for each of many loads
    args.questions = args.questions or args.demos
    if odd := set(args.layers) - set(DROPPED):
        parser.error(f"--layers: {odd} are none of {sorted(DROPPED)}")
    everything = demonstrations(args.out / "worked.jsonl", TRAINING)
    few = demonstrations(args.out / f"worked-{args.demos}.jsonl", args.demos)
    asked = demonstrations(args.out / f"worked-{args.questions}.jsonl", args.questions)
    teacher = sft(args.out / "teacher", BASE, everything, args, lr=1e-4, epochs=args.teacher_epochs)
    print(f"{'teacher, 30 layers':24} pass@1 {shown(teacher['after']['pass@1'])}")
    ratios = []
    for layers in args.layers:
        student = args.out / f"student{layers}"
        small = str(cut_down(layers, args.out / f"cut{layers}"))
        sft(student, small, few, args, lr=2e-4, epochs=args.student_epochs, is_measured=False)
        folders = {kind: args.out / f"{student.name}-{kind}" for kind in ("supervised", args.divergence)}
        off, on = (
            distil(folder, student, args.out / "teacher", asked, kind=kind, args=args)
            for kind, folder in folders.items()
        )
        print(f"{f'student, {layers} layers':24} pass@1 {shown(off['before']['pass@1'])}")
        report("  supervised, forward_kl", off)
        report(f"  on-policy, {args.divergence}", on)
        supervised, on_policy = folders.values()
        print(
            f"{'':24} on-policy - supervised: {'{:+.3f} [{:+.3f}, {:+.3f}]'.format(*difference(on_policy, supervised))}"
        )
        ratios.append(ratio_of_gains(on_policy, supervised))
        print(f"{'':24} gain ratio: {ratios[-1][0]:.2f} [{ratios[-1][1]:.2f}, {ratios[-1][2]:.2f}]", flush=True)
    if ratios:
        print(f"mean gain ratio over students: {np.mean([r[0] for r in ratios]):.2f}")


if __name__ == "__main__":
    main()
