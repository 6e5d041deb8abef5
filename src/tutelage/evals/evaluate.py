"""Sample a model on tasks, judge, and say how good it is, with intervals and the chance level beside it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from tutelage.errors import ConfigError
from tutelage.evals.passk import TaskCounts, pass_at_k_of_tasks
from tutelage.evals.result import EvalResult
from tutelage.monitors.entropy import entropy_stats
from tutelage.monitors.sampling import MakeTrajectory, PromptText, judge_tasks, sample_tasks, verdict_of
from tutelage.types import Progress, Sampler, SamplingParams, Task, Trajectory, Verifier, seed_for


def evaluate(
    sampler: Sampler,
    tasks: Sequence[Task],
    verifier: Verifier,
    *,
    text: PromptText,
    n: int,
    params: SamplingParams,
    seed: int,
    ks: Sequence[int] = (1, 8),
    greedy: bool = True,
    chance: bool = True,
    chance_draws: int = 4,
    make_trajectory: MakeTrajectory | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """n samples of every task, judged; pass@k, greedy accuracy and chance level from them.

    A task's samples depend on (seed, task id) alone, so a subset of the tasks gives the same samples of those tasks.

    Args:
        text: `text.ChatText` of the model: renders prompts, and completions as spans.
        n: samples a task; at least the largest k.
        params: how they are drawn. The greedy answers use the same lengths and stops.
        chance: judge the same samples against other tasks of the same family as well, `chance_draws` others each.
        make_trajectory: builds the trajectories instead of `text`, for tasks that are more than a prompt and an answer.

    Raises:
        ConfigError: no task, repeated task ids, n < 1, some k < 1 or above n.
        SamplerError: the sampler returned another number of completions than asked for.
        VerifierError: the verifier returned another number of verdicts than it was given trajectories.
    """
    check_settings(tasks, n, ks)
    watch = _Watch()
    draw = partial(
        sample_tasks,
        sampler,
        tasks,
        text=text,
        make_trajectory=make_trajectory,
        seed=seed,
        purpose="evaluate",
        progress=progress,
    )
    trajectories = draw(n=n, params=params)
    watch.lap("sample")
    judged = judge_tasks(verifier, _pairs(tasks, trajectories), what="judge", progress=progress)
    watch.lap("judge")
    greedy_judged: list[list[Trajectory]] = []
    if greedy:
        # Sample index n: a greedy answer never shares an id with a sampled one.
        answers = draw(n=1, params=replace(params, temperature=0.0, top_p=1.0), first=n)
        greedy_judged = judge_tasks(verifier, _pairs(tasks, answers), what="judge greedy", progress=progress)
        watch.lap("greedy")
    chances: Mapping[str, float | None] = {}
    alone: tuple[str, ...] = ()
    if chance:
        chances, alone = chance_level(verifier, tasks, judged, ks=ks, seed=seed, draws=chance_draws, progress=progress)
        if greedy:
            once, _ = chance_level(
                verifier, tasks, greedy_judged, ks=(1,), seed=seed, draws=chance_draws, progress=progress
            )
            chances = {**chances, "greedy": once["pass@1"]}
        watch.lap("chance")
    flat = tuple(t for group in judged for t in group)
    flat_greedy = tuple(t for group in greedy_judged for t in group)
    return EvalResult(
        counts=_counts(tasks, judged),
        ks=tuple(ks),
        seed=seed,
        sampling={**asdict(params), "stop": list(params.stop), "n": n},
        greedy_counts=_counts(tasks, greedy_judged) if greedy else None,
        chance=chances,
        chance_left_out=alone,
        entropy=entropy_stats(flat),
        mean_tokens=sum(t.num_sampled for t in flat) / len(flat),
        truncated_share=sum(t.is_truncated for t in flat) / len(flat),
        num_samples=len(flat),
        num_tokens=sum(t.num_sampled for t in flat) + sum(t.num_sampled for t in flat_greedy),
        seconds=watch.laps,
        trajectories=flat,
        greedy_trajectories=flat_greedy,
    )


def check_settings(tasks: Sequence[Task], n: int, ks: Sequence[int]) -> None:
    """Lists everything that is wrong with what an evaluation was asked for."""
    problems = []
    if not tasks:
        problems.append("an evaluation needs at least one task, got none")
    ids = [t.id for t in tasks]
    if len(set(ids)) != len(ids):
        repeated = sorted({i for i in ids if ids.count(i) > 1})[:3]
        problems.append(f"task ids must be unique; repeated: {repeated}")
    if n < 1:
        problems.append(f"n must be at least 1 sample a task, got {n}")
    if not ks or min(ks) < 1 or max(ks) > n:
        problems.append(f"every k of pass@k must be between 1 and n={n}, got {tuple(ks)}: raise n or lower k")
    if problems:
        raise ConfigError(problems)


def chance_level(
    verifier: Verifier,
    tasks: Sequence[Task],
    trajectories_P_G: Sequence[Sequence[Trajectory]],
    *,
    ks: Sequence[int],
    seed: int,
    draws: int = 4,
    progress: Progress | None = None,
) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """pass@k of the same samples when each task's are judged against other tasks of its family.

    What is left is what needs no understanding of the question: answers that many questions share, and verifiers that
    accept too much. Each of the `draws` assigns every task another one (no task is judged by its own answer, and no
    pair repeats: shifts of one random order of the family); their pass@k are averaged.

    Returns:
        ({"pass@k": value, or None where no task has one}, ids of tasks whose family has no other task).
    """
    rng = np.random.default_rng(seed_for(seed, "chance"))
    families: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        families.setdefault(task.name, []).append(i)
    pairs: list[list[tuple[int, int]]] = [[] for _ in range(draws)]
    for members in families.values():
        order = [members[j] for j in rng.permutation(len(members))]
        shifts = 1 + rng.permutation(max(0, len(order) - 1))
        for d in range(draws if len(order) > 1 else 0):
            shift = int(shifts[d % len(shifts)])
            pairs[d] += [(i, order[(at + shift) % len(order)]) for at, i in enumerate(order)]
    alone = tuple(tasks[m[0]].id for m in families.values() if len(m) == 1)
    values: dict[str, list[float]] = {f"pass@{k}": [] for k in ks}
    for chosen in pairs:
        work = [(tasks[other], [_as_answer_to(tasks[other], t) for t in trajectories_P_G[i]]) for i, other in chosen]
        judged = judge_tasks(verifier, work, what="judge against other tasks", progress=progress)
        counts = [
            TaskCounts.of(tasks[i].id, tasks[i].name, [verdict_of(t) for t in group])
            for (i, _), group in zip(chosen, judged, strict=True)
        ]
        for k in ks:
            by_task = pass_at_k_of_tasks(counts, k)
            if by_task:
                values[f"pass@{k}"].append(sum(by_task.values()) / len(by_task))
    return {m: (sum(v) / len(v) if v else None) for m, v in values.items()}, alone


def _as_answer_to(task: Task, trajectory: Trajectory) -> Trajectory:
    """The same tokens, presented as an answer to another task. Its id differs, so no verdict is taken from a cache."""
    other = f"{trajectory.id}~{task.id}"
    return replace(trajectory, id=other, task_id=task.id, task_hash=task.hash, task_name=task.name, verdict=None)


def _pairs(tasks: Sequence[Task], groups: Sequence[list[Trajectory]]) -> list[tuple[Task, list[Trajectory]]]:
    return list(zip(tasks, groups, strict=True))


def _counts(tasks: Sequence[Task], judged: Sequence[Sequence[Trajectory]]) -> tuple[TaskCounts, ...]:
    return tuple(
        TaskCounts.of(task.id, task.name, [verdict_of(t) for t in group])
        for task, group in zip(tasks, judged, strict=True)
    )


class _Watch:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
