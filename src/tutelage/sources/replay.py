"""Earlier rounds again, beside the new one: pooled samples (RFT, Llama 2's lesson) and replay buffers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from tutelage.data.rounds import RoundStore
from tutelage.sources.accepted import same_as
from tutelage.types import REPLAYED, Draw, DrawContext, Group, Source, Trajectory


class Replay:
    """What the inner source draws, plus the kept trajectories of up to `rounds` earlier rounds of the stage.

    The new round's statistics are its own; replayed groups follow it. A span replayed after an update is no longer
    on-policy, so the draw says it is not as soon as anything is replayed.

    Args:
        rounds: how many earlier rounds are replayed; None pools all of them.
        distinct: leave out a replayed completion whose text, or whose verdict's key, the same prompt has again; None
            leaves out none.
    """

    def __init__(
        self, source: Source, *, rounds: int | None = None, distinct: Literal["text", "key"] | None = "text"
    ) -> None:
        self.source, self.rounds, self.distinct = source, rounds, distinct
        self._history: list[list[Group]] = []
        self._num_drawn = 0

    def draw(self, ctx: DrawContext) -> Draw:
        self._load_history(ctx)
        draw = self.source.draw(ctx)
        self._num_drawn += 1
        kept = [replace(g, trajectories=tuple(t for t in g.trajectories if t.weight != 0)) for g in draw.groups]
        now = [g for g in kept if g.trajectories]
        if ctx.kept:
            RoundStore(ctx.kept / "replay").commit(self._num_drawn - 1, [t for g in now for t in g.trajectories])
        old = self._history if self.rounds is None else self._history[-self.rounds :] if self.rounds else []
        self._history.append(now)
        seen = {(g.task.hash, same_as(t, self.distinct)) for g in now for t in g.trajectories}
        replayed: list[Group] = []
        for g in (g for past in reversed(old) for g in past):
            ts: list[Trajectory] = []
            for t in g.trajectories:
                key = (g.task.hash, same_as(t, self.distinct))
                if not (self.distinct and key in seen):
                    again = replace(t, prompt_index=len(draw.groups) + len(replayed))
                    ts.append(again.marked(REPLAYED, weight=t.weight))
                    seen.add(key)
            if ts:
                replayed.append(replace(g, trajectories=tuple(ts)))
        return replace(
            draw,
            groups=(*draw.groups, *replayed),
            is_on_policy=draw.is_on_policy and not replayed,
            stats={**draw.stats, "data/num_replayed": float(sum(len(g.trajectories) for g in replayed))},
        )

    def _load_history(self, ctx: DrawContext) -> None:
        """After a resume, the rounds drawn before it come back from disk, with their tasks from the inner source."""
        if len(self._history) >= self._num_drawn or ctx.kept is None:
            return
        store = RoundStore(ctx.kept / "replay")
        tasks = {task.hash: task for task in _tasks(self.source)}
        for index in range(len(self._history), self._num_drawn):
            groups: dict[int, list[Trajectory]] = {}
            for t in store.load(index) or []:
                groups.setdefault(t.prompt_index, []).append(t)
            self._history.append([Group(task=tasks[ts[0].task_hash], trajectories=tuple(ts)) for ts in groups.values()])

    def state(self) -> Mapping[str, Any]:
        return {"inner": self.source.state(), "num_drawn": self._num_drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state["inner"])
        self._num_drawn = int(state["num_drawn"])
        self._history = []


def _tasks(source: Any) -> list[Any]:
    """The tasks at the bottom of a chain of wrapped sources."""
    while not hasattr(source, "tasks") and not hasattr(source, "groups"):
        source = source.source
    return list(source.tasks) if hasattr(source, "tasks") else [g.task for g in source.groups]
