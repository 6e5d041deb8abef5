"""A source with recorded text beside it, for a second loss."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tutelage.sources.recorded import Recorded, marked
from tutelage.types import RECORDED, Draw, DrawContext, Source


class Beside:
    """What the inner source draws, followed by the next recorded groups. The draw stays the inner source's.

    The recorded part is for a signal that tells the two apart (`signals.WithPretraining`, by task name); author and
    on-policy mark say what they say of the inner part.

    Args:
        source: whose trajectories the method is about.
        recorded: what comes along, with its own cursor.
    """

    def __init__(self, source: Source, recorded: Recorded) -> None:
        self.source, self.recorded = source, recorded

    def draw(self, ctx: DrawContext) -> Draw:
        draw = self.source.draw(ctx)
        first = len(draw.groups)
        more = [
            replace(g, trajectories=tuple(replace(t, prompt_index=first + i) for t in marked(g, RECORDED).trajectories))
            for i, g in enumerate(self.recorded.draw(ctx).groups)
        ]
        stats = {**draw.stats, "data/num_texts": float(sum(len(g.trajectories) for g in more))}
        return replace(draw, groups=(*draw.groups, *more), stats=stats)

    def state(self) -> Mapping[str, Any]:
        return {"source": self.source.state(), "recorded": self.recorded.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state["source"])
        self.recorded.restore(state["recorded"])
