"""Rationalisation: prompts nobody solved are asked again with the answer as a hint, and the hint is taken out again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutelage.data.rounds import RoundStore
from tutelage.sources.drawn import make_trajectory, moved_behind_another_prompt
from tutelage.types import (
    Draw,
    DrawContext,
    Group,
    Sampler,
    SampleRequest,
    SamplingParams,
    Source,
    Task,
    Trajectory,
    Verifier,
    seed_for,
)

MARK = "hinted"


class Hinted:
    """What the inner source draws and, for each prompt with no accepted sample, `n` more that were shown a hint.

    A hinted completion is judged like any other and then stands behind the prompt *without* the hint: that is what it
    is trained on. Its context was changed after it was sampled, so it has no behaviour log-probabilities, carries the
    mark "hinted", and makes the draw off-policy. Prompts without an answer get none.

    Args:
        source: judged completions by prompt.
        hint: the task as the sampler is to see it.
        n: completions of each unsolved prompt.

    Source:
        Zelikman et al. 2022 (STaR), arXiv:2203.14465, section 3.2.
    """

    def __init__(
        self,
        source: Source,
        verifier: Verifier,
        *,
        hint: Callable[[Task], Task],
        params: SamplingParams,
        n: int = 1,
        author: str = "student",
        chunk_rows: int = 1024,
    ) -> None:
        self.source, self.verifier, self.hint, self.params = source, verifier, hint, params
        self.n, self.author, self.chunk_prompts = n, author, max(1, chunk_rows // n)

    def draw(self, ctx: DrawContext) -> Draw:
        draw = self.source.draw(ctx)
        unsolved = [i for i, g in enumerate(draw.groups) if g.task.answer is not None and not _is_solved(g)]
        chunks = [unsolved[s : s + self.chunk_prompts] for s in range(0, len(unsolved), self.chunk_prompts)]
        store = RoundStore(ctx.store / "hinted") if ctx.store else None
        done: dict[int, list[Trajectory]] = {}
        sampler: Sampler | None = None
        share = range(len(chunks)) if ctx.processes is None else ctx.processes.share(range(len(chunks)))
        for index in share:
            kept = store.load(index) if store else None
            if kept is None:
                assert ctx.sampler is not None  # the inner source has drawn already
                sampler = sampler or ctx.sampler(self.author)
                kept = self._answers(ctx, sampler, draw.groups, chunks[index])
                if store:
                    store.commit(index, kept)
            done[index] = kept
        if ctx.processes is not None:
            done = ctx.processes.gather_dict(done)
        more: dict[int, list[Trajectory]] = {}
        for index in range(len(chunks)):
            for t in done[index]:
                more.setdefault(t.prompt_index, []).append(t)
        groups = [replace(g, trajectories=(*g.trajectories, *more.get(i, ()))) for i, g in enumerate(draw.groups)]
        stats = {
            "data/num_prompts_hinted": float(len(unsolved)),
            "data/num_hinted_accepted": float(
                sum(t.verdict is not None and t.verdict.is_accepted for ts in more.values() for t in ts)
            ),
        }
        return replace(
            draw, groups=tuple(groups), is_on_policy=draw.is_on_policy and not more, stats={**draw.stats, **stats}
        )

    def _answers(
        self, ctx: DrawContext, sampler: Sampler, groups: Sequence[Group], chunk: Sequence[int]
    ) -> list[Trajectory]:
        requests = []
        for i in chunk:
            prompt = ctx.text.render_prompt(self.hint(groups[i].task))
            ids = tuple(t for span in prompt for t in span.token_ids)
            seed = seed_for(ctx.seed, ctx.stage, ctx.round, groups[i].trajectories[0].id, "hint")
            requests.append(SampleRequest(prompt_ids=ids, n=self.n, seed=seed))
        answers = sampler.sample(requests, self.params, progress=ctx.progress)
        out: list[Trajectory] = []
        for i, completions in zip(chunk, answers, strict=True):
            task, first = groups[i].task, groups[i].trajectories[0]
            plain = ctx.text.render_prompt(task)
            made = []
            for j, completion in enumerate(completions):
                t = make_trajectory(
                    ctx.text, task, plain, completion, sampler, self.params, trajectory_id=f"{first.id}h{j}"
                )
                made.append(
                    replace(
                        moved_behind_another_prompt(t),
                        prompt_index=first.prompt_index,
                        sample_index=len(groups[i].trajectories) + j,
                        marks=(MARK,),
                    )
                )
            verdicts = self.verifier.judge(task, made)
            out += [replace(t, verdict=v) for t, v in zip(made, verdicts, strict=True)]
        return out

    def state(self) -> Mapping[str, Any]:
        return self.source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state)


def _is_solved(group: Group) -> bool:
    return any(t.verdict is not None and t.verdict.is_accepted for t in group.trajectories)
