"""Several sources in one draw, each prompt's worth by a share that may change with time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutelage.errors import ConfigError, DataError
from tutelage.sources.recorded import marked
from tutelage.types import RECORDED, Draw, DrawContext, Group, Source, Task, Trajectory


class Mixed:
    """The groups of every inner source, one after another.

    How much of each there is, is the inner sources' own business (`per_round`); weights may scale their loss.

    Args:
        sources: name and source, in a fixed order.
        weight: name -> weight of that source's trajectories in the loss; a function of the round where it changes.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        weight: Mapping[str, float | Callable[[int], float]] | None = None,
    ) -> None:
        if not sources:
            raise ConfigError("Mixed needs at least one source, got none")
        unknown = set(weight or {}) - set(sources)
        if unknown:
            raise ConfigError(f"Mixed: weights for {sorted(unknown)}, but the sources are {sorted(sources)}")
        self.sources = dict(sources)
        self.weight = dict(weight or {})

    def draw(self, ctx: DrawContext) -> Draw:
        groups: list[Group] = []
        stats: dict[str, float] = {}
        draws = []
        for name, source in self.sources.items():
            draw = source.draw(ctx.inside(name))
            draws.append(draw)
            weight = self.weight.get(name, 1.0)
            factor = weight(ctx.round) if callable(weight) else weight
            for g in draw.groups if draw.author != RECORDED else (marked(g, RECORDED) for g in draw.groups):
                ts = (replace(t, weight=t.weight * factor, prompt_index=len(groups)) for t in g.trajectories)
                groups.append(replace(g, trajectories=tuple(ts)))
            stats |= {f"{key}/{name}": value for key, value in draw.stats.items()}
        return Draw(
            groups=tuple(groups),
            author=_one_author(draws),
            is_on_policy=all(d.is_on_policy for d in draws),
            stats=stats,
        )

    def state(self) -> Mapping[str, Any]:
        return {name: source.state() for name, source in self.sources.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, source in self.sources.items():
            source.restore(state[name])


class Pooled:
    """Several authors' completions of the same prompts, as one group a prompt: keep rules then look at all of them.

    The sources draw the same prompts in the same order (`Drawn` of one task set). Ids of all but the first get the
    source's name.

    Args:
        sources: name and source, in a fixed order.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        if not sources:
            raise ConfigError("Pooled needs at least one source, got none")
        self.sources = dict(sources)

    @property
    def tasks(self) -> Sequence[Task]:
        return next(iter(self.sources.values())).tasks  # type: ignore[attr-defined, no-any-return]

    def draw(self, ctx: DrawContext) -> Draw:
        draws = {name: source.draw(ctx.inside(name)) for name, source in self.sources.items()}
        first = next(iter(draws.values()))
        groups = []
        for i, group in enumerate(first.groups):
            pool: list[Trajectory] = []
            for k, (name, draw) in enumerate(draws.items()):
                other = draw.groups[i]
                if other.task.hash != group.task.hash:
                    raise DataError(f"Pooled: prompt {i} is another one in source {name!r}; all must draw the same")
                more = (replace(t, id=f"{t.id}@{name}") if k else t for t in other.trajectories)
                pool += [replace(t, sample_index=len(pool) + j) for j, t in enumerate(more)]
            groups.append(replace(group, trajectories=tuple(pool)))
        stats = {f"{key}/{name}": value for name, draw in draws.items() for key, value in draw.stats.items()}
        on_policy = all(d.is_on_policy for d in draws.values())
        return Draw(groups=tuple(groups), author=_one_author(list(draws.values())), is_on_policy=on_policy, stats=stats)

    def state(self) -> Mapping[str, Any]:
        return {name: source.state() for name, source in self.sources.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, source in self.sources.items():
            source.restore(state[name])


def _one_author(draws: Sequence[Draw]) -> str:
    authors = {d.author for d in draws}
    return authors.pop() if len(authors) == 1 else "mixed"
