"""Sampling a fixed set of tasks and judging the answers: what probes and evaluations share."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from tutelage.errors import DataError, SamplerError, VerifierError
from tutelage.types import (
    Completion,
    Progress,
    Sampler,
    SampleRequest,
    SamplingParams,
    Span,
    Task,
    Trajectory,
    Verdict,
    Verifier,
    seed_for,
)

_TASKS_AT_ONCE = 32
"""Tasks judged between two steps of the progress bar."""


class MakeTrajectory(Protocol):
    """Turns one completion of a task into the trajectory that is judged and stored."""

    def __call__(self, task: Task, prompt_index: int, sample_index: int, completion: Completion) -> Trajectory: ...


class PromptText(Protocol):
    """What sampling needs of `text.ChatText`."""

    @property
    def fingerprint(self) -> str: ...

    def render_prompt(self, task: Task) -> Sequence[Span]: ...


def sample_tasks(
    sampler: Sampler,
    tasks: Sequence[Task],
    *,
    text: PromptText,
    n: int,
    params: SamplingParams,
    seed: int,
    purpose: str,
    first: int = 0,
    make_trajectory: MakeTrajectory | None = None,
    progress: Progress | None = None,
) -> list[list[Trajectory]]:
    """n trajectories of each task. A task's samples depend on (seed, purpose, task id), not on the other tasks.

    Args:
        text: renders the prompts, and the completions as spans.
        purpose: part of the seeds and of the ids.
        first: sample index of the first one.
        make_trajectory: builds the trajectories instead, for tasks that are more than a prompt and an answer.

    Raises:
        SamplerError: the sampler returned another number of completions than asked for.
    """
    prompts = [tuple(text.render_prompt(task)) for task in tasks]
    requests = [
        SampleRequest(
            prompt_ids=tuple(t for span in spans for t in span.token_ids), n=n, seed=seed_for(seed, purpose, task.id)
        )
        for task, spans in zip(tasks, prompts, strict=True)
    ]
    completions = sampler.sample(requests, params, progress=progress)
    if [len(c) for c in completions] != [n] * len(tasks):
        raise SamplerError(
            f"{len(tasks)} prompts with {n} samples each were asked of {sampler.author!r}; it returned "
            f"{len(completions)} prompts with {sorted({len(c) for c in completions})} samples"
        )

    def plain(task: Task, prompt_index: int, sample_index: int, completion: Completion) -> Trajectory:
        span = completion.as_span(sampler.author, sampler.version, params)
        return Trajectory(
            id=f"{purpose}/{sampler.version}/{task.id}/{sample_index}",
            task_id=task.id,
            task_hash=task.hash,
            task_name=task.name,
            spans=(*prompts[prompt_index], span),
            messages=(*task.messages, {"role": "assistant", "content": completion.text}),
            completion=completion.text,
            prompt_index=prompt_index,
            sample_index=sample_index,
            finish=completion.finish,
            tokenizer=text.fingerprint,
        )

    make = make_trajectory or plain
    return [
        [make(task, i, j, c) for j, c in enumerate(group, start=first)]
        for i, (task, group) in enumerate(zip(tasks, completions, strict=True))
    ]


def judge_tasks(
    verifier: Verifier,
    work: Sequence[tuple[Task, Sequence[Trajectory]]],
    *,
    what: str,
    progress: Progress | None = None,
) -> list[list[Trajectory]]:
    """The same trajectories, each with its verdict.

    A verifier with `judge_many` is given many tasks at a time, so that its workers share all of them.

    Raises:
        VerifierError: the verifier returned another number of verdicts than it was given trajectories.
    """
    if progress:
        progress.start(what, sum(len(group) for _, group in work), "samples")
    many = getattr(verifier, "judge_many", None)
    out = []
    for start in range(0, len(work), _TASKS_AT_ONCE):
        part = work[start : start + _TASKS_AT_ONCE]
        judged = many(part) if many is not None else [verifier.judge(task, group) for task, group in part]
        for (task, group), verdicts in zip(part, judged, strict=True):
            if len(verdicts) != len(group):
                raise VerifierError(
                    f"verifier {verifier.name!r} must give one verdict for each of {len(group)} trajectories of task "
                    f"{task.id!r}, gave {len(verdicts)}"
                )
            out.append([replace(t, verdict=v) for t, v in zip(group, verdicts, strict=True)])
            if progress:
                progress.advance(len(group))
    if progress:
        progress.finish()
    return out


def verdict_of(trajectory: Trajectory) -> Verdict:
    """Its verdict.

    Raises:
        DataError: it was never judged.
    """
    if trajectory.verdict is None:
        raise DataError(f"trajectory {trajectory.id!r} has no verdict: judge it before counting")
    return trajectory.verdict
