"""Training time to equal held-out loss: ours against TRL's SFTTrainer.

    TUTELAGE_SHARED_DATA=../shared/data OMP_NUM_THREADS=1 .venv/bin/python bench/sft_time_to_loss.py

SmolLM2-135M on GSM8K answers: the same conversations in the same batches of 8, the same constant learning rate, AdamW
and clipping. Every `--every` updates one evaluator in float32 (plain transformers, held-out questions) measures both;
its time is not counted, nor is loading; the slow first updates are. Each arm is a process of its own. "trl bf16" trains
bfloat16 weights, "trl autocast" float32 weights with bfloat16 autocast. The level is the higher of the two runs' lowest
losses; the time to it is interpolated between evaluations, in wall seconds and in the process's CPU seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from sft_arms import HeldOut, Ours, Step, conversations, machine, trl_trainer

ARMS = ("ours", "trl bf16", "trl autocast")
BATCH = 8
Point = dict[str, float]


class Curve:
    """Held-out loss against training time so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.held_out, self.every = HeldOut(args.held_out), args.every
        self.points: list[Point] = []
        self.updates, self.wall_s, self.cpu_s = 0, 0.0, 0.0

    def add(self, step: Step) -> bool:
        """Counts a step; true where an evaluation is due."""
        self.updates, self.wall_s, self.cpu_s = self.updates + 1, self.wall_s + step.wall_s, self.cpu_s + step.cpu_s
        return bool(self.updates % self.every == 0)

    def measure(self, weights: dict[str, Any]) -> None:
        loss = self.held_out.loss(weights)
        self.points.append({"updates": self.updates, "wall_s": self.wall_s, "cpu_s": self.cpu_s, "loss": loss})
        print(json.dumps(self.points[-1]), file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> list[Point]:
    curve = Curve(args)
    ours = Ours(limit=BATCH * args.updates, batch=BATCH, lr=args.lr, seed=args.seed)
    curve.measure(ours.weights())
    if args.arm == "ours":
        for step in ours.steps(args.updates):
            if curve.add(step):
                curve.measure(ours.weights())
        return curve.points
    order = ours.order()
    del ours
    rows = conversations(BATCH * args.updates)

    def on_step(model: Any, step: Step) -> None:
        if curve.add(step):
            curve.measure({n: p.detach().float() for n, p in model.named_parameters()})

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(
            [rows[i] for i in order],
            Path(folder),
            steps=args.updates,
            lr=args.lr,
            seed=args.seed,
            dtype="bfloat16" if args.arm == "trl bf16" else "float32",
            on_step=on_step,
            per_device_train_batch_size=BATCH,
            max_length=1024,
            train_sampling_strategy="sequential",
        )
        trainer.train()
    return curve.points


def child(arm: str, args: argparse.Namespace) -> list[Point]:
    command = [sys.executable, "-W", "ignore", __file__, "--arm", arm]
    for name in ("updates", "every", "held_out", "lr", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{arm} failed:\n{done.stderr[-2000:]}")
    points: list[Point] = json.loads(done.stdout.splitlines()[-1])
    return points


def time_to(points: list[Point], level: float, clock: str) -> float:
    """Seconds until the held-out loss first reaches the level, linear between evaluations."""
    for a, b in pairwise(points):
        if b["loss"] <= level:
            share = (a["loss"] - level) / (a["loss"] - b["loss"])
            return a[clock] + share * (b[clock] - a[clock])
    raise ValueError(f"the loss never reaches {level}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--arm", choices=ARMS, help="run one arm here and print its points")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run(args)))
        return
    print(machine(), flush=True)
    curves = {}
    for arm in args.arms:
        curves[arm] = child(arm, args)
        for p in curves[arm]:
            print(f"{arm}: {p['updates']} updates, {p['wall_s']:.0f} s wall, {p['cpu_s']:.0f} s CPU, {p['loss']:.4f}")
        sys.stdout.flush()
        if arm == "ours":
            continue
        level = max(min(p["loss"] for p in curves[a]) for a in ("ours", arm))
        if level >= curves[arm][0]["loss"]:
            print(f"one of ours and {arm} never got better", flush=True)
            continue
        for clock in ("wall_s", "cpu_s"):
            own, other = (time_to(curves[a], level, clock) for a in ("ours", arm))
            print(
                f"to {level:.4f} nats, {clock}: ours {own:.0f}, {arm} {other:.0f}, ratio {other / own:.2f}", flush=True
            )


if __name__ == "__main__":
    main()
