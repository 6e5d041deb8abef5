"""Student rollouts and recorded answers in one draw, prompt by prompt (GKD, ImitKD, DistiLLM)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tutelage.data.rounds import RoundStore
from tutelage.errors import ConfigError, DataError
from tutelage.sources.adaptive import AdaptiveShare
from tutelage.sources.drawn import Drawn
from tutelage.sources.recorded import marked
from tutelage.types import RECORDED, REPLAYED, Draw, DrawContext, Group, SamplingParams, Trajectory, seed_for

Share = float | Callable[[int], float] | AdaptiveShare


class StudentShare:
    """Each prompt is answered by the student with probability `share`, else by its recorded trajectories.

    The coin of a prompt depends on (seed, stage, its place in the stage) and on nothing else, so a resumed run tosses
    it the same way. 0 is supervised distillation, 1 on-policy distillation.

    Trajectories that were not sampled for the draw carry the mark "recorded" or "replayed".

    Args:
        groups: the recorded trajectories by prompt (demonstrations or a teacher's answers).
        share: a number, a function of the round, or an `AdaptiveShare` (then earlier rollouts may be replayed).
        params, n, author: how the student answers.
        per_round: prompts in a round; None takes every prompt once.
        rounds: rounds of the whole stage, which an `AdaptiveShare` needs to know how far it is.
        buffer_size: rollouts kept for replay.

    Source:
        Agarwal et al. 2023 (GKD), arXiv:2306.13649, algorithm 1, with the coin for each prompt instead of each step;
        Ko et al. 2024 (DistiLLM), arXiv:2402.03898, for the adaptive share and its replay.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        share: Share,
        params: SamplingParams | None = None,
        n: int = 1,
        author: str = "student",
        per_round: int | None = None,
        rounds: int | None = None,
        buffer_size: int = 1000,
    ) -> None:
        if not groups:
            raise DataError("StudentShare needs at least one recorded trajectory, got none: check the data path")
        if isinstance(share, AdaptiveShare) and rounds is None:
            raise ConfigError("an adaptive share makes fresh rollouts rarer over the stage: give the stage's rounds")
        if isinstance(share, int | float) and not 0 <= share <= 1:
            raise ConfigError(f"share must be in [0, 1], got {share}: it is the student's part of the prompts")
        self.groups, self.share, self.n, self.author = tuple(groups), share, n, author
        self.params = params or SamplingParams()
        self.per_round = per_round or len(self.groups)
        self.rounds, self.buffer_size = rounds, buffer_size
        self.position = 0
        self.num_drawn = 0
        self._buffer: list[Group] | None = None

    @property
    def tasks(self) -> list[Any]:
        return [g.task for g in self.groups]

    def draw(self, ctx: DrawContext) -> Draw:
        places = range(self.position, self.position + self.per_round)
        chosen = [self.groups[self._group_index(ctx, p)] for p in places]
        buffer = self._load_buffer(ctx)
        kinds = self._kinds(ctx, places, len(buffer))
        fresh, stats = self._fresh(ctx, [g for g, kind in zip(chosen, kinds, strict=True) if kind == "fresh"])
        answers = iter(fresh)
        groups: list[Group] = []
        for i, (place, group, kind) in enumerate(zip(places, chosen, kinds, strict=True)):
            if kind == "fresh":
                found = next(answers)
            elif kind == "replay":
                found = marked(buffer[seed_for(ctx.seed, ctx.stage, place, "replay") % len(buffer)], REPLAYED)
            else:
                found = marked(group, RECORDED)
            ts = (replace(t, prompt_index=i) for t in found.trajectories)
            groups.append(replace(found, trajectories=tuple(ts)))
        self._remember(ctx, fresh)
        self.position += self.per_round
        self.num_drawn += 1
        only = set(kinds)
        return Draw(
            groups=tuple(groups),
            author=self.author if only == {"fresh"} else "recorded" if only == {"recorded"} else "mixed",
            is_on_policy=only == {"fresh"} and self.author == "student",
            stats={
                **stats,
                "data/num_prompts": float(len(groups)),
                **{f"data/frac_prompts_{k}": kinds.count(k) / len(kinds) for k in ("fresh", "replay", "recorded")},
            },
        )

    def _group_index(self, ctx: DrawContext, place: int) -> int:
        passes, index = divmod(place, len(self.groups))
        rng = np.random.default_rng(seed_for(ctx.seed, ctx.stage, passes, "prompts"))
        return int(rng.permutation(len(self.groups))[index])

    def _kinds(self, ctx: DrawContext, places: range, num_buffered: int) -> list[str]:
        coins = [seed_for(ctx.seed, ctx.stage, p, "coin") / 2**63 for p in places]
        if isinstance(self.share, AdaptiveShare):
            self.share.update(ctx.scores)
            progress = min(1.0, ctx.round / max(1, self.rounds or 1))
            is_full = 0 < self.buffer_size <= num_buffered
            return [self.share.choose(c, progress, is_buffer_full=is_full) for c in coins]
        share = self.share(ctx.round) if callable(self.share) else self.share
        return ["fresh" if c < share else "recorded" for c in coins]

    def _fresh(self, ctx: DrawContext, groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
        if not groups:
            return [], {}
        tasks = [g.task for g in groups]
        source = Drawn(tasks, author=self.author, n=self.n, params=self.params, is_shuffled=False)
        draw = source.draw(ctx)
        return list(draw.groups), dict(draw.stats)

    # -- replay --------------------------------------------------------------------------------

    def _load_buffer(self, ctx: DrawContext) -> list[Group]:
        """Rollouts of earlier draws, oldest first; after a resume they come back from disk."""
        if not isinstance(self.share, AdaptiveShare):
            return []
        if self._buffer is None:
            self._buffer = []
            tasks = {g.task.hash: g.task for g in self.groups}
            if ctx.kept is not None:
                store = self._store(ctx)
                for index in range(self.num_drawn):
                    for t in store.load(index) or []:
                        self._buffer.append(Group(task=tasks[t.task_hash], trajectories=(t,)))
        self._buffer = self._buffer[max(0, len(self._buffer) - self.buffer_size) :]
        return self._buffer

    def _remember(self, ctx: DrawContext, fresh: Sequence[Group]) -> None:
        if not isinstance(self.share, AdaptiveShare):
            return
        trajectories: list[Trajectory] = [t for g in fresh for t in g.trajectories]
        if ctx.kept is not None:
            self._store(ctx).commit(self.num_drawn, trajectories)
        assert self._buffer is not None
        self._buffer += [replace(g, trajectories=(t,)) for g in fresh for t in g.trajectories]

    def _store(self, ctx: DrawContext) -> RoundStore:
        assert ctx.kept is not None
        return RoundStore(ctx.kept / "share")

    # -- state ---------------------------------------------------------------------------------

    def state(self) -> Mapping[str, Any]:
        share = dict(self.share.state()) if isinstance(self.share, AdaptiveShare) else None
        return {"position": self.position, "num_drawn": self.num_drawn, "share": share}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.position, self.num_drawn = int(state["position"]), int(state["num_drawn"])
        if isinstance(self.share, AdaptiveShare):
            self.share.restore(state["share"])
        self._buffer = None
