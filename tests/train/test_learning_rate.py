"""What rate each update of a stage gets: none is made at 0, whatever the schedule."""

import pytest

from tutelage.policies.table import TablePolicy
from tutelage.signals import HardTargets
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer, learning_rate
from tutelage.train.trainer import Place, Trainer, TrainerSettings
from tutelage.types import Draw, Group, Span, Task, Trajectory

TASK = Task(id="q", messages=({"role": "user", "content": "q"},))


def draw(count: int) -> Draw:
    spans = (
        Span(token_ids=(0, 1), role="user", author="user"),
        Span(token_ids=(2, 3), role="assistant", author="human", is_sampled=True, is_trainable=True),
    )
    ts = tuple(Trajectory(id=str(i), task_id="q", task_hash=TASK.hash, spans=spans) for i in range(count))
    return Draw(groups=(Group(task=TASK, trajectories=ts),))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("updates", "rounds"), [(1, 1), (1, 3), (7, 2)])
def test_no_update_is_made_at_a_rate_of_zero(schedule: str, updates: int, rounds: int) -> None:
    policy = TablePolicy(5)
    trainer = Trainer(policy, Optimizer(policy.named_parameters(), kind="sgd"), processes=Processes())
    settings = TrainerSettings(lr=0.1, batch_size=1, epochs=1, schedule=schedule, warmup=0.1, max_tokens=64)
    signal = HardTargets()
    targets = signal.prepare(draw(updates), score_student=trainer.score)
    rates = [
        step.metrics["train/lr"]
        for r in range(rounds)
        for step in trainer.steps(targets, signal, settings, Place(seed=0, stage=0, round=r, num_rounds=rounds))
    ]
    count = updates * rounds
    expected = [learning_rate(0.1, (i + 0.5) / count, schedule=schedule, warmup=0.1) for i in range(count)]
    assert rates == pytest.approx(expected) and min(rates) > 0
    if schedule != "constant":
        assert rates[-1] == min(rates[1:], default=rates[0])
