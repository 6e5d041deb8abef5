"""What a run's models cost, by author, and the operations spent so far: the ledger as a run keeps it.

Sampling is counted by who wrote the tokens, training and the student's own scores by trajectory, and a teacher in this
process counts what really runs through it. Servers and caches cost nothing here; evaluations are not counted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tutelage.train.ledger import Ledger, ModelCost
from tutelage.types import Draw, Trajectory

Counter = Callable[[Sequence[int], int], None]
"""Called with the lengths of the documents run through a teacher, and how many positions had logits."""


class RunLedger:
    """Adds up the operations of a run.

    Args:
        student: cost of the trained model.
        authors: costs of other models that write trajectories, by author.
        sum_numbers: adds the same names over all processes; None for one process.
    """

    def __init__(
        self,
        student: ModelCost,
        *,
        authors: Mapping[str, ModelCost] | None = None,
        sum_numbers: Callable[[Mapping[str, float]], dict[str, float]] | None = None,
    ) -> None:
        self.student = student
        self.authors = {"student": student, **(authors or {})}
        self.ledger = Ledger()
        self._sum = sum_numbers
        self._pending = {"flops": 0.0, "tokens": 0.0}

    def counter(self, cost: ModelCost) -> Counter:
        """For a teacher to call with everything that runs through it."""

        def count(lengths: Sequence[int], num_heads: int) -> None:
            self._pending["flops"] += sum(cost.forward(n, heads=0) for n in lengths) + num_heads * cost.head
            self._pending["tokens"] += num_heads

        return count

    def drawn(self, draw: Draw) -> None:
        """Sampling: a prompt with several samples by the same author is run once. What was recorded, or sampled for
        an earlier draw, was paid for elsewhere."""
        for group in draw.groups:
            by_author: dict[str, list[Trajectory]] = {}
            for t in group.trajectories:
                author = next((s.author for s in t.spans if s.is_sampled), "")
                if author in self.authors and draw.is_fresh(t):
                    by_author.setdefault(author, []).append(t)
            for author, ts in by_author.items():
                self.ledger.sampled(self.authors[author], ts, prompt_shared=len(ts))

    def scored(self, trajectories: Sequence[Trajectory]) -> None:
        """The student's own log-probabilities."""
        self.ledger.scored("scoring", self.student, trajectories)

    def forget_teacher(self) -> None:
        """What a resumed run computes again was counted before."""
        self._pending = {"flops": 0.0, "tokens": 0.0}

    def updated(self, trajectories: Sequence[Trajectory]) -> None:
        """One update, and what the teachers in this process did since the last."""
        self.ledger.trained(self.student, trajectories)
        pending = self._sum(self._pending) if self._sum is not None else self._pending
        self.ledger.flops["teacher"] += pending["flops"]
        self.ledger.tokens["teacher"] += int(pending["tokens"])
        self.forget_teacher()

    def summary(self) -> dict[str, Any]:
        """For `result.json`: operations and tokens by part, and shares."""
        total = self.ledger.total
        return {
            "flops": {**self.ledger.flops, "total": total},
            "tokens": dict(self.ledger.tokens),
            "shares": {k: v / total for k, v in self.ledger.flops.items()} if total else {},
        }

    def state(self) -> Mapping[str, Any]:
        return self.ledger.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.ledger.restore(state)
        self.forget_teacher()
