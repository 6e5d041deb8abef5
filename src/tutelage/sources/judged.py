"""A source with verdicts: every trajectory is judged once, and its verdict is stored with it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tutelage.data.rounds import RoundStore
from tutelage.types import Draw, DrawContext, Group, Source, Status, Trajectory, Verifier


class Judged:
    """What the inner source draws, with a verdict on each. Nothing is removed; an error verdict is no rejection.

    Verdicts are committed chunk by chunk, since a verifier with a time limit may not say the same thing twice.
    """

    def __init__(self, source: Source, verifier: Verifier, *, chunk_prompts: int = 64) -> None:
        self.source, self.verifier, self.chunk_prompts = source, verifier, chunk_prompts

    def draw(self, ctx: DrawContext) -> Draw:
        draw = self.source.draw(ctx)
        store = RoundStore(ctx.store / "judged") if ctx.store else None
        chunks = [draw.groups[s : s + self.chunk_prompts] for s in range(0, len(draw.groups), self.chunk_prompts)]
        if ctx.progress:
            ctx.progress.start(f"judging with {self.verifier.name}", len(draw), "samples")
        done: dict[int, list[Trajectory]] = {}
        share = range(len(chunks)) if ctx.processes is None else ctx.processes.share(range(len(chunks)))
        for index in share:
            kept = store.load(index) if store else None
            if kept is None:
                kept = self.judge(chunks[index])
                if store:
                    store.commit(index, kept)
            if ctx.progress:
                ctx.progress.advance(len(kept))
            done[index] = kept
        if ctx.processes is not None:
            done = ctx.processes.gather_dict(done)
        if ctx.progress:
            ctx.progress.finish()
        judged = [t for index in range(len(chunks)) for t in done[index]]
        return draw.with_trajectories(judged, **verdict_stats(judged))

    def judge(self, groups: tuple[Group, ...]) -> list[Trajectory]:
        """All trajectories of the groups, in order, each with its verdict."""
        pairs = [(g.task, g.trajectories) for g in groups]
        many = getattr(self.verifier, "judge_many", None)
        verdicts = many(pairs) if many else [self.verifier.judge(task, ts) for task, ts in pairs]
        return [
            replace(t, verdict=v)
            for group, group_verdicts in zip(groups, verdicts, strict=True)
            for t, v in zip(group.trajectories, group_verdicts, strict=True)
        ]

    def state(self) -> Mapping[str, Any]:
        return self.source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state)


def verdict_stats(trajectories: list[Trajectory]) -> dict[str, float]:
    """Shares of accept, reject and error among what was judged."""
    judged = [t.verdict for t in trajectories if t.verdict is not None]
    total = max(1, len(judged))
    return {f"data/frac_{status.value}": sum(v.status is status for v in judged) / total for status in Status}
