"""A probe: one look at the policy on a fixed set of prompts, the same seeds every time, every sample counted."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tutelage.errors import DataError
from tutelage.monitors.drift import mean_nll, sampled_kl
from tutelage.monitors.entropy import (
    EntropyStats,
    answer_entropy,
    entropy_stats,
    sampled_entropies,
    solution_key,
)
from tutelage.monitors.sampling import MakeTrajectory, PromptText, judge_tasks, sample_tasks, verdict_of
from tutelage.numerics.statistics import Estimate
from tutelage.types import (
    DrawContext,
    Progress,
    Sampler,
    SamplingParams,
    Scorer,
    Status,
    Task,
    Trajectory,
    Verifier,
    content_hash,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProbe:
    """One prompt's samples, counted."""

    task_id: str
    n: int
    """Samples judged: accepted or rejected."""
    c: int
    """Samples accepted."""
    errors: int = 0
    """Samples that could not be judged; in no statistic."""
    distinct: int = 0
    """Distinct accepted solutions."""
    keys: tuple[str, ...] = ()
    """Hash of each accepted solution, repeats kept. A monitor's history keeps only `distinct`."""
    entropy_nats: float = 0.0
    """Sum of the token entropies over this prompt's samples, nats."""
    entropy_tokens: int = 0
    """Tokens in that sum; 0 where entropies are unknown."""
    answer_entropy: float | None = None
    """Entropy of the answers given, right and wrong, nats; None where nothing was judged."""

    def __post_init__(self) -> None:
        if not 0 <= self.c <= self.n or not 0 <= self.distinct <= self.c:
            raise DataError(
                f"probe of task {self.task_id!r} needs distinct <= accepted <= judged; "
                f"got {self.distinct}, {self.c}, {self.n}"
            )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the monitors know of one moment of a run."""

    step: int
    """Optimiser steps done."""
    round: int = 0
    version: str = ""
    """Which weights answered."""
    tasks: tuple[TaskProbe, ...]
    """The fixed probe set, in order."""
    samples: int
    """Samples asked of each prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    is_accepted_only: bool = False
    """Must be False: accepted samples alone have lower entropy and no failures."""
    entropy: EntropyStats | None = None
    kl_forward: Estimate | None = None
    """KL(base || policy), nats per token, from base samples. None if not measured."""
    kl_reverse: Estimate | None = None
    """KL(policy || base), nats per token, from these samples. None if not measured."""
    heldout_nll: Estimate | None = None
    """Nats per token of held-out demonstrations under the policy. None if not measured."""
    retention: Mapping[str, Estimate] = field(default_factory=dict)
    """Other task set -> gain over base on it, paired (negative is forgetting)."""
    at_temperature_cap: bool | None = None
    """True where the source's sampling temperature can go no higher; None where the source does not say."""
    checkpoint: str = ""
    """Where these weights are saved; "" if they are not."""
    seconds: float = 0.0
    """What the probe took."""
    tokens: int = 0
    """Tokens sampled for it."""

    def __post_init__(self) -> None:
        if self.is_accepted_only or self.temperature != 1 or self.top_p != 1:
            raise DataError(
                "a probe needs every sample of the policy at temperature 1 and top-p 1; got temperature "
                f"{self.temperature:g}, top-p {self.top_p:g}, accepted only: {self.is_accepted_only} (step "
                f"{self.step}). Sample the probe set by itself instead of reusing a training draw."
            )
        if len({t.task_id for t in self.tasks}) != len(self.tasks) or not self.tasks:
            raise DataError(f"a probe needs at least one task and unique ids, got {len(self.tasks)} tasks")

    @property
    def task_ids(self) -> tuple[str, ...]:
        return tuple(t.task_id for t in self.tasks)

    @property
    def answer_entropy(self) -> float | None:
        """Mean over prompts of the entropy of the answers, nats."""
        known = [t.answer_entropy for t in self.tasks if t.answer_entropy is not None]
        return sum(known) / len(known) if known else None

    def without_keys(self) -> "Probe":
        """What a history keeps: the counts, not the solutions."""
        return replace(self, tasks=tuple(replace(t, keys=()) for t in self.tasks))

    def to_json(self) -> dict[str, Any]:
        body = asdict(self)
        body["tasks"] = [{**t, "keys": list(t["keys"])} for t in body["tasks"]]
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Probe":
        def estimate(fields: Mapping[str, Any] | None) -> Estimate | None:
            return None if fields is None else Estimate(**fields)

        kls = {name: estimate(body[name]) for name in ("kl_forward", "kl_reverse", "heldout_nll")}
        return cls(
            **{
                **body,
                **kls,
                "tasks": tuple(TaskProbe(**{**t, "keys": tuple(t["keys"])}) for t in body["tasks"]),
                "entropy": None if body["entropy"] is None else EntropyStats.from_json(body["entropy"]),
                "retention": {name: Estimate(**e) for name, e in body["retention"].items()},
            }
        )


def run_probe(
    sampler: Sampler,
    tasks: Sequence[Task],
    verifier: Verifier,
    *,
    text: PromptText,
    n: int,
    seed: int,
    step: int,
    round: int = 0,
    max_new_tokens: int = 512,
    stop: tuple[str, ...] = (),
    make_trajectory: MakeTrajectory | None = None,
    progress: Progress | None = None,
) -> tuple[Probe, list[Trajectory]]:
    """Sample n completions of every probe prompt at temperature 1 and top-p 1, judge them, and count.

    The seeds depend on (seed, task) alone: two probes of equal weights are equal.

    Returns:
        The probe, and its trajectories with their verdicts (a base model's are what forward KL is measured on later).
    """
    started = time.perf_counter()
    groups = sample_tasks(
        sampler,
        tasks,
        text=text,
        make_trajectory=make_trajectory,
        n=n,
        params=SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=max_new_tokens, stop=stop),
        seed=seed,
        purpose="probe",
        progress=progress,
    )
    judged = judge_tasks(verifier, list(zip(tasks, groups, strict=True)), what="judge the probe", progress=progress)
    flat = [t for group in judged for t in group]
    probe = Probe(
        step=step,
        round=round,
        version=sampler.version,
        tasks=tuple(count_task(task.id, group) for task, group in zip(tasks, judged, strict=True)),
        samples=n,
        entropy=entropy_stats(flat),
        seconds=time.perf_counter() - started,
        tokens=sum(t.num_sampled for t in flat),
    )
    return probe, flat


def count_task(task_id: str, trajectories: Sequence[Trajectory]) -> TaskProbe:
    """One prompt's judged samples, counted. Errors leave everything except the token entropies."""
    statuses = Counter(verdict_of(t).status for t in trajectories)
    judged = [t for t in trajectories if verdict_of(t).status is not Status.ERROR]
    keys = tuple(content_hash(solution_key(t)) for t in judged if verdict_of(t).is_accepted)
    entropies = [e for t in trajectories if (e := sampled_entropies(t)) is not None]
    return TaskProbe(
        task_id=task_id,
        n=len(judged),
        c=len(keys),
        errors=statuses[Status.ERROR],
        distinct=len(set(keys)),
        keys=keys,
        entropy_nats=sum(sum(e) for e in entropies),
        entropy_tokens=sum(len(e) for e in entropies),
        answer_entropy=answer_entropy([solution_key(t) for t in judged]) if judged else None,
    )


class Prober:
    """Probes the policy for every monitor of a run: each state of the weights is sampled once, whoever asks.

    Args:
        author: which sampler of the context is the policy.
        step: gives the optimiser steps done so far.
        base_scorer: scores under the base model, for KL(policy || base).
        base_samples: the base model's own samples (the `samples` of a probe made before training), which the policy
            scores for KL(base || policy); or a function of the context and the policy's newest samples that gives
            them. Keep them with the run: a resumed run cannot make them again.
        policy_scorer: scores under the policy as it is now, for KL(base || policy) and held-out demonstrations.
        heldout: demonstrations that are never trained on.
        extras: further fields of `Probe` that the run knows (`retention`, `at_temperature_cap`, `checkpoint`), given
            the context; `tokens` are added to those of the probe itself.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        verifier: Verifier,
        *,
        text: PromptText,
        seed: int,
        step: Callable[[], int],
        n: int = 16,
        max_new_tokens: int = 512,
        stop: tuple[str, ...] = (),
        author: str = "student",
        make_trajectory: MakeTrajectory | None = None,
        base_scorer: Scorer | None = None,
        base_samples: Sequence[Trajectory] | Callable[[DrawContext, Sequence[Trajectory]], Sequence[Trajectory]] = (),
        policy_scorer: Scorer | None = None,
        heldout: Sequence[Trajectory] = (),
        extras: Callable[[DrawContext], Mapping[str, Any]] = lambda ctx: {},
    ) -> None:
        self._tasks, self._verifier, self._author, self._step = tasks, verifier, author, step
        self._how: dict[str, Any] = dict(
            text=text,
            make_trajectory=make_trajectory,
            n=n,
            seed=seed,
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        self._base_scorer, self._policy_scorer, self._heldout = base_scorer, policy_scorer, heldout
        self._extras = extras
        self._base_samples = base_samples
        self.samples: Sequence[Trajectory] = ()
        """Every sample of the newest probe, with its verdict."""
        self._last: tuple[tuple[str, int, int, int], Probe] | None = None

    def __call__(self, ctx: DrawContext) -> Probe:
        """The probe of the weights as they are now.

        Raises:
            DataError: the context has no sampler.
        """
        if ctx.sampler is None:
            raise DataError(f"a probe needs a sampler of {self._author!r}, the context has none")
        sampler, step = ctx.sampler(self._author), self._step()
        key = (sampler.version, ctx.stage, ctx.round, step)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        started = time.perf_counter()
        probe, self.samples = run_probe(
            sampler, self._tasks, self._verifier, step=step, round=ctx.round, progress=ctx.progress, **self._how
        )
        fields: dict[str, Any] = dict(self._extras(ctx))
        fields["tokens"] = probe.tokens + fields.get("tokens", 0)
        base = self._base_samples(ctx, self.samples) if callable(self._base_samples) else self._base_samples
        if base and self._policy_scorer is not None:
            fields["kl_forward"] = sampled_kl(base, self._policy_scorer)
        if self._base_scorer is not None:
            fields["kl_reverse"] = sampled_kl(self.samples, self._base_scorer)
        if self._policy_scorer is not None and self._heldout:
            fields["heldout_nll"] = mean_nll(self._heldout, self._policy_scorer)
        probe = replace(probe, **fields, seconds=time.perf_counter() - started)
        self._last = (key, probe)
        return probe
