"""Training speed of SFT against TRL's SFTTrainer: real tokens a second, and what the machine allows.

    TUTELAGE_SHARED_DATA=../shared/data OMP_NUM_THREADS=1 .venv/bin/python bench/sft_throughput.py

SmolLM2-135M, GSM8K questions with worked answers, loss on the answers only, AdamW, clipping at 1. Each arm is a process
of its own; arms take turns for `--rounds` rounds. The first three updates of a run are dropped (libraries warm up,
memory is touched for the first time). A real token is one of a prompt or an answer; padding does not count. Arms:

    ours         Workbench, Trainer and HardTargets: bfloat16 weights, float32 masters, packed rows
    trl padded   SFTTrainer, bfloat16 weights without masters, the same conversations an update, padded
    trl sorted   the same, batches of like lengths
    trl packed   the same, packed rows of as many tokens as those conversations have on average
    trl autocast as padded, float32 weights with bfloat16 autocast: the precision of ours

"wall" is tokens per second of wall time, "cpu" per second of the process's CPU time: the one to read at
OMP_NUM_THREADS=1 on a machine that does other work. The last part (alone with `--profile`) measures a 2048-cubed
bfloat16 product, what a token costs in operations, and where our time goes, by a profile of one update. `--curves`
instead prints the loss of each update and the held-out loss with bfloat16 weights over float32 masters (our layers, and
transformers' own) and with float32 weights: the same data, order and learning rate.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft_arms import HeldOut, Ours, Step, bfloat16_ceiling, conversations, machine, trl_trainer

DROPPED = 3
ARMS = ("ours", "trl padded", "trl sorted", "trl packed", "trl autocast")
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::linear"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward", "aten::_scaled_dot"),
    "optimiser": ("aten::_fused_adamw", "aten::linalg_vector_norm"),
    "loss and its statistics": ("aten::_log_softmax", "aten::exp", "aten::amax", "aten::gather", "aten::scatter"),
    "copies and casts": ("aten::copy_", "aten::fill_", "aten::cat", "aten::index"),
    "elementwise": ("aten::mul", "aten::add", "aten::silu", "aten::pow", "aten::sum", "aten::div", "aten::neg"),
}
BY_SHAPE = ("aten::mul", "aten::copy_", "aten::sum", "aten::clamp", "aten::add")
"""Elementwise work on rows of logits belongs to the loss."""


def run_ours(args: argparse.Namespace) -> list[Step]:
    ours = Ours(limit=args.batch * args.steps, batch=args.batch, lr=2e-5, seed=0)
    return list(ours.steps(args.steps))


def run_trl(args: argparse.Namespace) -> list[Step]:
    steps: list[Step] = []
    rows = conversations(args.batch * args.steps * (2 if args.arm == "trl packed" else 1))
    options: dict[str, Any] = {"per_device_train_batch_size": args.batch, "max_length": 1024}
    if args.arm == "trl packed":
        options = {"packing": True, "max_length": args.packed_length, "per_device_train_batch_size": args.packed_rows}
    if args.arm == "trl sorted":
        options["train_sampling_strategy"] = "group_by_length"
    dtype = "float32" if args.arm == "trl autocast" else "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(
            rows,
            Path(folder),
            steps=args.steps,
            lr=2e-5,
            seed=0,
            dtype=dtype,
            on_step=lambda model, step: steps.append(step),
            **options,
        )
        trainer.train()
    return steps


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Tokens a second over the steady steps of one run."""
    steady = steps[DROPPED:]
    tokens = sum(s["tokens"] for s in steady)
    return {
        "tokens": tokens / len(steady),
        "wall": tokens / sum(s["wall_s"] for s in steady),
        "cpu": tokens / sum(s["cpu_s"] for s in steady),
    }


def child(arm: str, args: argparse.Namespace) -> dict[str, float]:
    """One run of one arm in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--arm", arm, "--steps", str(args.steps)]
    command += ["--batch", str(args.batch), "--packed-length", str(args.packed_length)]
    command += ["--packed-rows", str(args.packed_rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{arm} failed:\n{done.stderr[-2000:]}")
    return summary(json.loads(done.stdout.splitlines()[-1]))


def profile_ours(args: argparse.Namespace) -> None:
    """The ceiling, the share of it that is used, and where the time goes."""
    from torch.profiler import ProfilerActivity, profile

    from tutelage.train.ledger import cost_of

    ours = Ours(limit=args.batch * (DROPPED + 2), batch=args.batch, lr=2e-5, seed=0)
    steps = ours.steps(DROPPED + 2)
    for _ in range(DROPPED):
        next(steps)
    ceiling = bfloat16_ceiling()[1]
    plain = next(steps)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step = next(steps)
    cost = cost_of(ours.trainer.policy.causal_model)
    body, head = 3 * cost.body / 1e9, 3 * cost.head / 1e9
    work = plain.tokens * body + plain.targets * head
    print(f"bfloat16 2048-cubed product: {ceiling:.0f} GF/s of CPU time")
    print(f"a token costs {body:.3f} GF in the layers; a target {head:.3f} GF more (attention not counted)")
    print(
        f"an update of {plain.tokens} tokens, {plain.targets} targets: {work:.0f} GF, {plain.cpu_s:.2f} s CPU, "
        f"{plain.tokens / plain.cpu_s:.0f} tok/s; at the ceiling {work / ceiling:.2f} s, "
        f"{plain.tokens * ceiling / work:.0f} tok/s: {work / ceiling / plain.cpu_s:.0%} of it"
    )
    parts = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in seen.key_averages(group_by_input_shape=True):
        name = next((p for p, ops in PARTS.items() if event.key.startswith(ops)), "rest")
        if any(49152 in shape and len(shape) == 2 and shape[0] < 64 for shape in event.input_shapes if shape):
            name = "loss and its statistics"
        parts[name] += event.self_cpu_time_total / 1e6
    total = sum(parts.values())
    print(f"where a profiled update of {step.tokens} tokens goes, {total:.2f} s:")
    for name, seconds in parts.items():
        print(f"  {name:24s} {seconds:.2f} s {seconds / total:5.0%}")


CURVES = {
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, plain layers": {"precision": "bfloat16", "is_fused": False},
    "float32": {"precision": "float32"},
}


def curves(args: argparse.Namespace) -> None:
    """Loss of each update in each precision on the same batches, and the held-out loss before and after."""
    held_out = HeldOut(args.held_out)
    runs, ends = {}, {}
    for name, options in CURVES.items():
        ours = Ours(limit=8 * args.steps, batch=8, lr=2e-5, seed=args.seed, **options)
        before = held_out.loss(ours.weights())
        runs[name] = [s.loss for s in ours.steps(args.steps)]
        ends[name] = (before, held_out.loss(ours.weights()))
        print(f"{name}: held-out {before:.4f} before, {ends[name][1]:.4f} after {args.steps} updates", flush=True)
    print(f"| update | {' | '.join(runs)} |\n|---|---|---|---|")
    for i, losses in enumerate(zip(*runs.values(), strict=True), 1):
        print(f"| {i} | {' | '.join(f'{x:.4f}' for x in losses)} |")
    for name in list(runs)[:-1]:
        gaps = [a - b for a, b in zip(runs[name], runs["float32"], strict=True)]
        mean, spread = statistics.mean(gaps), statistics.stdev(gaps)
        print(
            f"{name} minus float32: mean {mean:+.4f} nats, standard error {spread / len(gaps) ** 0.5:.4f}, "
            f"largest {max(map(abs, gaps)):.4f}; held-out at the end {ends[name][1] - ends['float32'][1]:+.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8, help="conversations an update")
    parser.add_argument("--packed-length", type=int, default=896)
    parser.add_argument("--packed-rows", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--arm", choices=ARMS, help="run one arm here and print its steps")
    parser.add_argument("--profile", action="store_true", help="only the ceiling and the profile")
    parser.add_argument("--curves", action="store_true", help="only the loss curves of both precisions")
    parser.add_argument("--held-out", type=int, default=12, help="held-out conversations of --curves")
    parser.add_argument("--seed", type=int, default=0, help="order of the conversations in --curves")
    args = parser.parse_args()
    if args.arm:
        steps = run_ours(args) if args.arm == "ours" else run_trl(args)
        print(json.dumps([vars(s) for s in steps]))
        return
    print(machine(), flush=True)
    if args.curves:
        curves(args)
        return
    if not args.profile:
        results: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
        for number in range(args.rounds):
            for arm in args.arms:
                results[arm].append(child(arm, args))
                print(f"round {number}, {arm}: { ({k: round(v) for k, v in results[arm][-1].items()}) }", flush=True)
        print("| arm | tokens an update | wall tok/s | cpu tok/s | ours / arm, wall | ours / arm, cpu |")
        print("|---|---|---|---|---|---|")
        for arm, runs in results.items():
            cells = [f"{statistics.median(r[k] for r in runs):.0f}" for k in ("tokens", "wall", "cpu")]
            for k in ("wall", "cpu"):
                pairs = zip(results["ours"], runs, strict=True)
                cells.append(f"{statistics.median(o[k] / r[k] for o, r in pairs):.2f}")
            print(f"| {arm} | {' | '.join(cells)} |", flush=True)
    profile_ours(args)


if __name__ == "__main__":
    main()
