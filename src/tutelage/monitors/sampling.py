"""Sampling a fixed set of tasks and judging the answers: what probes and evaluations share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from tutelage.errors import DataError, SamplerError, VerifierError
from tutelage.types import (
    Completion,
    Progress,
    Sampler,
    SampleRequest,
    SamplingParams,
    Task,
    Trajectory,
    Verdict,
    Verifier,
    seed_for,
)


class MakeTrajectory(Protocol):
    """Turns one completion of a task into the trajectory that is judged and stored."""

    def __call__(self, task: Task, prompt_index: int, sample_index: int, completion: Completion) -> Trajectory: ...


PromptIds = Callable[[Task], Sequence[int]]
"""Renders a task to the tokens of its prompt, ending where the assistant is to speak."""


def sample_tasks(
    sampler: Sampler,
    tasks: Sequence[Task],
    *,
    prompt_ids: PromptIds,
    make_trajectory: MakeTrajectory,
    n: int,
    params: SamplingParams,
    seed: int,
    purpose: str,
    first: int = 0,
    progress: Progress | None = None,
) -> list[list[Trajectory]]:
    """n trajectories of each task. A task's samples depend on (seed, purpose, task id), not on the other tasks.

    Args:
        first: sample index of the first one.

    Raises:
        SamplerError: the sampler returned another number of completions than asked for.
    """
    requests = [
        SampleRequest(prompt_ids=tuple(prompt_ids(task)), n=n, seed=seed_for(seed, purpose, task.id)) for task in tasks
    ]
    completions = sampler.sample(requests, params, progress=progress)
    if [len(c) for c in completions] != [n] * len(tasks):
        raise SamplerError(
            f"{len(tasks)} prompts with {n} samples each were asked of {sampler.author!r}; it returned "
            f"{len(completions)} prompts with {sorted({len(c) for c in completions})} samples"
        )
    return [
        [_sampled_with(params, make_trajectory(task, i, j, c)) for j, c in enumerate(group, start=first)]
        for i, (task, group) in enumerate(zip(tasks, completions, strict=True))
    ]


def _sampled_with(params: SamplingParams, trajectory: Trajectory) -> Trajectory:
    """The completion's span says how it was drawn: `make_trajectory` need not know greedy from sampled."""
    spans = list(trajectory.spans)
    last = max((i for i, s in enumerate(spans) if s.is_sampled), default=None)
    if last is not None:
        spans[last] = replace(spans[last], sampling=params)
    return replace(trajectory, spans=tuple(spans))


def judge_tasks(
    verifier: Verifier,
    work: Sequence[tuple[Task, Sequence[Trajectory]]],
    *,
    what: str,
    progress: Progress | None = None,
) -> list[list[Trajectory]]:
    """The same trajectories, each with its verdict.

    Raises:
        VerifierError: the verifier returned another number of verdicts than it was given trajectories.
    """
    if progress:
        progress.start(what, sum(len(group) for _, group in work), "samples")
    out = []
    for task, group in work:
        verdicts = verifier.judge(task, group)
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
