"""Tiny runs, fixed seeds: loss and gradient norm of every step against a committed file, with SGD as well as Adam.

Adam divides a wrong scale away; SGD shows it. `make golden` writes the files anew: say in the changelog which number
moved and why.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.policies.policy import Policy
from tutelage.policies.table import TablePolicy
from tutelage.signals import HardTargets, TeacherDistribution
from tutelage.signals.base import DIVISORS
from tutelage.testing.tiny import tiny_model
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Place, Trainer, TrainerSettings
from tutelage.types import Draw, Group, Span, Task, Trajectory

torch.set_num_threads(1)
HERE = Path(__file__).parent
TASK = Task(id="q", messages=({"role": "user", "content": "?"},))


def draw(vocab: int) -> Draw:
    rng = np.random.default_rng(0)
    ts = []
    for i in range(12):
        prompt, answer = rng.integers(0, vocab, 3).tolist(), rng.integers(0, vocab, int(rng.integers(2, 9))).tolist()
        spans = (
            Span(token_ids=tuple(prompt), role="user", author="user"),
            Span(token_ids=tuple(answer), role="assistant", author="human", is_sampled=True, is_trainable=True),
        )
        weight = float(i % 4 != 3)
        ts.append(Trajectory(id=str(i), task_id="q", task_hash=TASK.hash, spans=spans, weight=weight))
    return Draw(groups=(Group(task=TASK, trajectories=tuple(ts)),))


def run(policy: Any, signal: Any, vocab: int, kind: str) -> list[dict[str, float]]:
    trainer = Trainer(policy, Optimizer(policy.named_parameters(), kind=kind), processes=Processes())
    config = TrainerSettings(
        lr=0.5 if kind == "sgd" else 0.01, batch_size=4, epochs=5, schedule="cosine", warmup=0.1, max_tokens=24
    )
    targets = signal.prepare(draw(vocab), score_student=trainer.score)
    place = Place(seed=0, stage=0, round=0, num_rounds=1)
    keys = ("train/loss", "train/grad_norm", "train/lr", "train/entropy_nats_per_target")
    return [{k: r.metrics[k] for k in keys} for r in trainer.steps(targets, signal, config, place)]


CASES: dict[str, Any] = {
    f"table-{kind}-{divisor}": lambda kind=kind, divisor=divisor: run(
        TablePolicy(5), HardTargets(divisor=divisor), 5, kind
    )
    for kind in ("sgd", "adamw")
    for divisor in DIVISORS
}
CASES |= {
    f"llama-{kind}": lambda kind=kind: run(Policy(tiny_model(layers=2, width=16)), HardTargets(), 250, kind)
    for kind in ("sgd", "adamw")
}


def distilled(kind: str) -> list[dict[str, float]]:
    from tutelage.policies.teachers import InProcessTeacher

    teacher = InProcessTeacher(TablePolicy(5, seed=7))
    return run(TablePolicy(5), TeacherDistribution(teacher, "reverse_kl"), 5, kind)


CASES |= {f"table-reverse-kl-{kind}": lambda kind=kind: distilled(kind) for kind in ("sgd", "adamw")}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    got = CASES[name]()
    path = HERE / f"{name}.json"
    if os.environ.get("TUTELAGE_WRITE_GOLDEN"):
        path.write_text("[\n" + ",\n".join(json.dumps(step) for step in got) + "\n]\n")
    expected = json.loads(path.read_text())
    assert len(got) == len(expected)
    tolerance = 1e-9 if name.startswith("table") else 1e-4
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a == pytest.approx(b, rel=tolerance), f"step {step}"
