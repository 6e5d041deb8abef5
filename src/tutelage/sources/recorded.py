"""Trajectories somebody recorded: demonstrations, a teacher's completions, an agent's logs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutelage.errors import DataError
from tutelage.types import Draw, DrawContext, Group


def marked(group: Group, mark: str) -> Group:
    """The group with a mark on each of its trajectories that says that it was not sampled for the draw."""
    ts = tuple(t if mark in t.marks else t.marked(mark, weight=t.weight) for t in group.trajectories)
    return replace(group, trajectories=ts)


class Recorded:
    """The same recorded trajectories every round, or the next `per_round` prompts of them.

    Off-policy: their authors are not the student. Args:
        groups: trajectories by prompt, in a fixed order.
        per_round: prompts in a round; None draws all of them. The cursor goes on where the last round ended and
            begins again at the end.
    """

    is_sampling = False
    """True (or absent) where a source samples the student."""

    def __init__(self, groups: Sequence[Group], *, per_round: int | None = None) -> None:
        if not groups:
            raise DataError("Recorded needs at least one trajectory, got none: check the data path and its quarantine")
        self.groups = tuple(groups)
        self.per_round = per_round
        self.position = 0

    def draw(self, ctx: DrawContext) -> Draw:
        if self.per_round is None:
            chosen = list(self.groups)
        else:
            count = len(self.groups)
            chosen = [self.groups[(self.position + i) % count] for i in range(self.per_round)]
            self.position = (self.position + self.per_round) % count
        numbered = tuple(
            replace(g, trajectories=tuple(replace(t, prompt_index=i) for t in g.trajectories))
            for i, g in enumerate(chosen)
        )
        return Draw(groups=numbered, author="recorded", is_on_policy=False, stats={"data/num_prompts": len(chosen)})

    def state(self) -> Mapping[str, Any]:
        return {"position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.position = int(state["position"])
