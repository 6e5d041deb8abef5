"""From judged samples to pass@k: by task, by task family, and pooled, with what was left out said beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.errors import DataError
from tutelage.numerics.statistics import Estimate, mean_over_tasks, pass_at_k_by_task
from tutelage.types import Status, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCounts:
    """Verdicts on one task's samples, counted. An error says nothing about the sample and is not in n."""

    task_id: str
    name: str
    """Task family."""
    n: int
    """Samples judged: accepted or rejected."""
    c: int
    """Samples accepted."""
    errors: int = 0
    """Samples the verifier could not judge."""

    def __post_init__(self) -> None:
        if not 0 <= self.c <= self.n or self.errors < 0:
            raise DataError(
                f"task {self.task_id!r}: counts need 0 <= accepted <= judged and errors >= 0; "
                f"got accepted {self.c}, judged {self.n}, errors {self.errors}"
            )

    @classmethod
    def of(cls, task_id: str, name: str, verdicts: Sequence[Verdict]) -> "TaskCounts":
        errors = sum(v.status is Status.ERROR for v in verdicts)
        accepted = sum(v.is_accepted for v in verdicts)
        return cls(task_id=task_id, name=name, n=len(verdicts) - errors, c=accepted, errors=errors)

    def to_json(self) -> dict[str, Any]:
        return {"task_id": self.task_id, "name": self.name, "n": self.n, "c": self.c, "errors": self.errors}


@dataclass(frozen=True, kw_only=True)
class PassAtK:
    """pass@k over tasks."""

    k: int
    estimate: Estimate | None
    """Mean over the tasks with at least k valid samples, resampled by task. None where there is no such task."""
    by_task: Mapping[str, float]
    """Task id -> its pass@k, for the tasks that have one."""
    left_out: tuple[str, ...]
    """Tasks with fewer than k valid samples. They are in no mean; a report must name how many there are."""

    def to_json(self) -> dict[str, Any]:
        """The form of `result.json`: value and interval, and the number of tasks left out."""
        body = {"value": None, "ci95": None} if self.estimate is None else self.estimate.to_json()
        return {**body, "tasks": len(self.by_task), "tasks_left_out": len(self.left_out)}


def pass_at_k_of_tasks(counts: Sequence[TaskCounts], k: int) -> dict[str, float]:
    """Task id -> pass@k, for the tasks with at least k valid samples, in order.

    Raises:
        DataError: k < 1, or a task id is repeated.
    """
    if len({c.task_id for c in counts}) != len(counts):
        raise DataError(f"task ids must be unique; {len(counts) - len({c.task_id for c in counts})} are repeated")
    values = pass_at_k_by_task([c.n for c in counts], [c.c for c in counts], k)
    return {c.task_id: float(v) for c, v in zip(counts, values, strict=True) if not np.isnan(v)}


def pass_at_k_over(counts: Sequence[TaskCounts], k: int, *, seed: int = 0) -> PassAtK:
    """pass@k of each task without bias, and its mean with a cluster bootstrap (95%, BCa) over tasks."""
    by_task = pass_at_k_of_tasks(counts, k)
    estimate = mean_over_tasks(list(by_task.values()), seed=seed) if by_task else None
    left_out = tuple(c.task_id for c in counts if c.task_id not in by_task)
    return PassAtK(k=k, estimate=estimate, by_task=by_task, left_out=left_out)


def pass_at_k_by_family(counts: Sequence[TaskCounts], k: int, *, seed: int = 0) -> dict[str, PassAtK]:
    """pass@k within each task family, families in the order they first appear."""
    families: dict[str, list[TaskCounts]] = {}
    for c in counts:
        families.setdefault(c.name, []).append(c)
    return {name: pass_at_k_over(group, k, seed=seed) for name, group in families.items()}
