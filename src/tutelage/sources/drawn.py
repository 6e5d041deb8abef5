"""Trajectories sampled now: by the student (on-policy) or by a teacher (off-policy)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tutelage.data.rounds import RoundStore
from tutelage.errors import ConfigError, DataError, SamplerError
from tutelage.types import (
    Completion,
    Draw,
    DrawContext,
    Group,
    Sampler,
    SampleRequest,
    SamplingParams,
    Task,
    Trajectory,
    seed_for,
)


class Drawn:
    """`n` completions of each of the next prompts, from an author.

    Prompts come in an order shuffled anew for each pass over the tasks, fixed by (seed, stage, pass); the cursor never
    loses or repeats one. They are cut into chunks by index, and each chunk is committed whole before the next: after a
    kill, finished chunks come back as they were and the others are drawn again from the same seeds.

    Args:
        tasks: prompts, with what a verifier needs.
        author: "student", or the name of a teacher in the plan.
        n: completions a prompt.
        params: how they are sampled. On-policy claims hold for this shaped distribution, which is also the one whose
            log-probabilities are stored.
        per_round: prompts in a round; None takes every task once.
        chunk_rows: completions in a chunk, about.
        view: the task as the author is to see it in a round (worked examples before it), or None for as it is. The
            completion then stands behind the plain task: its context was changed, so it has no behaviour
            log-probabilities and the draw is off-policy.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        author: str = "student",
        n: int = 1,
        params: SamplingParams | None = None,
        per_round: int | None = None,
        chunk_rows: int = 1024,
        is_shuffled: bool = True,
        view: Callable[[Task, int], Task | None] | None = None,
    ) -> None:
        if not tasks:
            raise DataError("Drawn needs at least one task to sample, got none: check the task set")
        if n > 1 and params is not None and params.is_greedy:
            raise ConfigError(f"n={n} with temperature 0 draws the same completion every time: raise the temperature")
        self.tasks, self.author, self.n = tuple(tasks), author, n
        self.params = params or SamplingParams()
        self.per_round = per_round or len(self.tasks)
        self.chunk_prompts = max(1, chunk_rows // n)
        self.is_shuffled, self.view = is_shuffled, view
        self.position = 0
        """Prompts drawn so far in this stage, over all passes."""

    def draw(self, ctx: DrawContext) -> Draw:
        if ctx.sampler is None or ctx.text is None:
            raise ConfigError("Drawn needs a sampler and a tokenizer in its context: it cannot be used without a model")
        chosen, base, chunks = self.next_prompts(ctx)
        store = RoundStore(ctx.store / "drawn") if ctx.store else None
        started = time.perf_counter()
        done: dict[int, list[Trajectory]] = {}
        share = range(len(chunks)) if ctx.processes is None else ctx.processes.share(range(len(chunks)))
        failed: SamplerError | None = None
        for index in share:
            kept = store.load(index) if store else None
            if kept is None:
                try:
                    kept = self.sample_chunk(ctx, chosen, chunks[index], base)
                except SamplerError as error:
                    failed = error
                    break
                if store:
                    store.commit(index, kept)
            done[index] = kept
        if ctx.processes is not None:
            done = ctx.processes.gather_or_stop(done, failed)
        elif failed is not None:
            raise failed
        by_prompt: list[list[Trajectory]] = [[] for _ in chosen]
        for index in range(len(chunks)):
            for t in done[index]:
                by_prompt[t.prompt_index].append(t)
        groups = tuple(Group(task=task, trajectories=tuple(ts)) for task, ts in zip(chosen, by_prompt, strict=True))
        return Draw(
            groups=groups,
            author=self.author,
            is_on_policy=self.author == "student" and not any(_is_changed(t) for g in groups for t in g.trajectories),
            stats=_stats(groups, time.perf_counter() - started),
        )

    def next_prompts(self, ctx: DrawContext) -> tuple[list[Task], int, list[range]]:
        """The round's prompts, how many came before them in the stage, and the chunks they are sampled in. Moves the
        cursor."""
        base = self.position
        orders: dict[int, np.ndarray] = {}
        chosen = [self.tasks[self._task_index(ctx, base + i, orders)] for i in range(self.per_round)]
        self.position += self.per_round
        count = len(chosen)
        return chosen, base, [range(s, min(s + self.chunk_prompts, count)) for s in range(0, count, self.chunk_prompts)]

    def _task_index(self, ctx: DrawContext, position: int, orders: dict[int, np.ndarray]) -> int:
        passes, place = divmod(position, len(self.tasks))
        if not self.is_shuffled:
            return place
        if passes not in orders:
            rng = np.random.default_rng(seed_for(ctx.seed, ctx.stage, passes, "prompts"))
            orders[passes] = rng.permutation(len(self.tasks))
        return int(orders[passes][place])

    def sample_chunk(self, ctx: DrawContext, tasks: Sequence[Task], chunk: range, base: int) -> list[Trajectory]:
        """The completions of the prompts of one chunk, in order."""
        assert ctx.sampler is not None  # `draw` has looked
        sampler = ctx.sampler(self.author)
        prompts = {i: ctx.text.render_prompt(tasks[i]) for i in chunk}
        seen = {i: self.view(tasks[i], ctx.round) if self.view is not None else None for i in chunk}
        shown = {i: prompts[i] if (v := seen[i]) is None else ctx.text.render_prompt(v) for i in chunk}
        requests = [
            SampleRequest(
                prompt_ids=tuple(t for span in shown[i] for t in span.token_ids),
                n=self.n,
                seed=seed_for(ctx.seed, ctx.stage, ctx.round, base + i),
            )
            for i in chunk
        ]
        answers = sampler.sample(requests, self.params, progress=ctx.progress)
        out = []
        for i, completions in zip(chunk, answers, strict=True):
            for j, completion in enumerate(completions):
                name = f"s{ctx.stage}r{ctx.round}p{base + i}n{j}"
                t = make_trajectory(
                    ctx.text, tasks[i], prompts[i], completion, sampler, self.params, trajectory_id=name
                )
                if seen[i] is not None:
                    t = moved_behind_another_prompt(t)
                out.append(replace(t, prompt_index=i, sample_index=j))
        return out

    def state(self) -> Mapping[str, Any]:
        return {"position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.position = int(state["position"])


def moved_behind_another_prompt(t: Trajectory) -> Trajectory:
    """Its last span was sampled in another context than it now has: what the sampler reported no longer holds."""
    return replace(t, spans=(*t.spans[:-1], replace(t.spans[-1], logprobs=None, is_context_exact=False)))


def _is_changed(t: Trajectory) -> bool:
    return bool(t.spans) and not t.spans[-1].is_context_exact


def make_trajectory(
    text: Any,
    task: Task,
    prompt_spans: Sequence[Any],
    completion: Completion,
    sampler: Sampler,
    params: SamplingParams,
    *,
    trajectory_id: str,
) -> Trajectory:
    """One sampled answer to a task, token-exact: the prompt's spans and one sampled span."""
    span = completion.as_span(sampler.author, sampler.version, params)
    return Trajectory(
        id=trajectory_id,
        task_id=task.id,
        task_hash=task.hash,
        task_name=task.name,
        spans=(*prompt_spans, span),
        messages=(*task.messages, {"role": "assistant", "content": completion.text}),
        completion=completion.text,
        finish=completion.finish,
        tokenizer=text.fingerprint,
    )


def _stats(groups: Sequence[Group], seconds: float) -> dict[str, float]:
    everything = [t for g in groups for t in g.trajectories]
    tokens = sum(t.num_sampled for t in everything)
    entropies = [e for t in everything for s in t.spans if s.entropies is not None for e in s.entropies]
    out = {
        "data/num_prompts": len(groups),
        "data/num_sampled_tokens": tokens,
        "data/mean_sampled_tokens": tokens / max(1, len(everything)),
        "data/frac_truncated": sum(t.is_truncated for t in everything) / max(1, len(everything)),
        "time/sample_s": seconds,
    }
    if entropies:
        out["policy/entropy_nats_per_token"] = float(np.mean(entropies))
    return out
