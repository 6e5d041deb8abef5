"""Dynamic sampling: groups that say nothing are replaced by the next prompts, in prompt order, up to a limit."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tutelage.errors import ConfigError
from tutelage.sources.drawn import Drawn
from tutelage.types import Draw, DrawContext, Group, Source

MARK = "same reward"


class Refilled:
    """Draws until `drawn.per_round` groups are useful, or `max_draws` draws were made.

    Every further draw takes exactly as many of the next prompts as are missing, so which prompts come never depends on
    speed, and the cursor of `drawn` says where the next round goes on. Groups that are not useful stay in the draw with
    weight 0 and a mark: a signal leaves such groups out of the step altogether.

    Args:
        source: judged groups, built on `drawn`.
        drawn: the source at the bottom.
        is_useful: whether a judged group has something to teach.
        max_draws: most draws in a round, the first included.

    Source:
        Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.2.
    """

    def __init__(self, source: Source, drawn: Drawn, *, is_useful: Callable[[Group], bool], max_draws: int = 4) -> None:
        if max_draws < 1:
            raise ConfigError(f"max_draws must be at least 1, got {max_draws}")
        self.source, self.drawn, self.is_useful, self.max_draws = source, drawn, is_useful, max_draws

    def draw(self, ctx: DrawContext) -> Draw:
        wanted = missing = self.drawn.per_round
        groups: list[Group] = []
        draws: list[Draw] = []
        try:
            while missing > 0 and len(draws) < self.max_draws:
                self.drawn.per_round = missing
                part = self.source.draw(replace(ctx, store=ctx.store / f"part{len(draws)}" if ctx.store else None))
                draws.append(part)
                for group in part.groups:
                    is_useful = self.is_useful(group)
                    missing -= is_useful
                    ts = (replace(t, prompt_index=len(groups)) for t in group.trajectories)
                    ts = ts if is_useful else (t.marked(MARK) for t in ts)
                    groups.append(replace(group, trajectories=tuple(ts)))
        finally:
            self.drawn.per_round = wanted
        stats = _mean_stats(draws)
        stats |= {"data/num_refill_draws": float(len(draws) - 1), "data/num_groups_missing": float(missing)}
        return replace(draws[0], groups=tuple(groups), stats=stats)

    def state(self) -> Mapping[str, Any]:
        return self.source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state)


def _mean_stats(draws: list[Draw]) -> dict[str, float]:
    """Counts and seconds add up; shares and means are weighted by trajectories."""
    total = sum(len(d) for d in draws)
    out: dict[str, float] = {}
    for d in draws:
        for name, value in d.stats.items():
            is_sum = name.startswith(("data/num_", "time/"))
            out[name] = out.get(name, 0.0) + (value if is_sum else value * len(d) / max(1, total))
    return out
