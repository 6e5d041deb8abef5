"""What an evaluation found, and the comparisons of two of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutelage.errors import DataError
from tutelage.evals.passk import PassAtK, TaskCounts, pass_at_k_by_family, pass_at_k_of_tasks, pass_at_k_over
from tutelage.monitors.entropy import EntropyStats
from tutelage.numerics.statistics import Estimate, paired_gain, wilson
from tutelage.types import Trajectory

Row = tuple[str, float | None, tuple[float, float] | None, float | None]
"""One line of a table: name, value, 95% interval, chance level."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One model on one set of tasks."""

    counts: tuple[TaskCounts, ...]
    """One entry for each task, in the order given."""
    ks: tuple[int, ...]
    seed: int
    """Of the samples and of the intervals."""
    sampling: Mapping[str, Any]
    """The sampling parameters, and `n` asked for."""
    greedy_counts: tuple[TaskCounts, ...] | None = None
    """The same tasks answered once with the most likely tokens; None if that was not asked for."""
    chance: Mapping[str, float | None] = field(default_factory=dict)
    """Metric -> its value when the same samples are judged against other tasks of the same family. Empty if not asked
    for; None for a metric that no task has."""
    chance_left_out: tuple[str, ...] = ()
    """Tasks with no other task in their family: they have no chance level."""
    entropy: EntropyStats
    mean_tokens: float
    """Sampled tokens a sample, stop token included."""
    truncated_share: float
    """Samples that ran into `max_new_tokens`."""
    num_samples: int
    num_tokens: int
    """Tokens sampled in all, greedy ones included."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time by phase: sample, judge, greedy, chance."""
    trajectories: tuple[Trajectory, ...] = ()
    """Every sample with its verdict, by task. Empty where the result was read back from JSON."""
    greedy_trajectories: tuple[Trajectory, ...] = ()

    @property
    def error_share(self) -> float:
        """Samples that the verifier could not judge."""
        return sum(c.errors for c in self.counts) / self.num_samples if self.num_samples else 0.0

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*(f"pass@{k}" for k in self.ks), *(("greedy",) if self.greedy_counts is not None else ()))

    def pass_at(self, k: int) -> PassAtK:
        """pass@k pooled over tasks, with its interval."""
        return pass_at_k_over(self.counts, k, seed=self.seed)

    def by_family(self, k: int) -> dict[str, PassAtK]:
        return pass_at_k_by_family(self.counts, k, seed=self.seed)

    @property
    def greedy(self) -> Estimate | None:
        """Greedy accuracy: one trial a task, Wilson interval. None if not measured or nothing could be judged."""
        judged = [c for c in self.greedy_counts or () if c.n]
        return wilson(sum(c.c for c in judged), len(judged)) if judged else None

    def by_task(self, metric: str) -> dict[str, float]:
        """Task id -> value, for the tasks that have one.

        Raises:
            DataError: the metric is neither "pass@k" nor "greedy", or greedy answers were not sampled.
        """
        if metric == "greedy":
            if self.greedy_counts is None:
                raise DataError("greedy accuracy was not measured in this evaluation: run it with greedy=True")
            return {c.task_id: c.c / c.n for c in self.greedy_counts if c.n}
        head, _, k = metric.partition("@")
        if head != "pass" or not k.isdecimal() or int(k) < 1:
            raise DataError(f'a metric is "greedy" or "pass@k" with k >= 1; got {metric!r}')
        return pass_at_k_of_tasks(self.counts, int(k))

    def metric_json(self, metric: str) -> dict[str, Any]:
        """{"value", "ci95", "chance", "tasks", "tasks_left_out"} of one metric; value None where nothing has one."""
        if metric == "greedy":
            values, estimate = self.by_task(metric), self.greedy
            body = {"value": None, "ci95": None} if estimate is None else estimate.to_json()
            body |= {"tasks": len(values), "tasks_left_out": len(self.counts) - len(values)}
        else:
            self.by_task(metric)  # refuses a metric of another form
            body = self.pass_at(int(metric.partition("@")[2])).to_json()
        return {"value": body["value"], "ci95": body["ci95"], "chance": self.chance.get(metric), **body}

    def rows(self) -> list[Row]:
        """One row for each metric, for a text table."""
        out: list[Row] = []
        for metric in self.metrics:
            body = self.metric_json(metric)
            ci = body["ci95"]
            out.append((metric, body["value"], None if ci is None else (ci[0], ci[1]), body["chance"]))
        return out

    def to_json(self, *, tasks: bool = True) -> dict[str, Any]:
        """The form of `result.json`; with `tasks`, also the counts that `from_json` needs for paired comparisons."""
        body: dict[str, Any] = {metric: self.metric_json(metric) for metric in self.metrics}
        families = {c.name for c in self.counts}
        if len(families) > 1:
            body["by_family"] = {
                name: {f"pass@{k}": self.by_family(k)[name].to_json() for k in self.ks} for name in sorted(families)
            }
        body |= {
            "num_tasks": len(self.counts),
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "mean_tokens": self.mean_tokens,
            "truncated_share": self.truncated_share,
            "error_share": self.error_share,
            "entropy_nats": self.entropy.to_json(),
            "sampling": dict(self.sampling),
            "seed": self.seed,
            "seconds": dict(self.seconds),
            "chance_left_out": len(self.chance_left_out),
        }
        if tasks:
            body["tasks"] = [c.to_json() for c in self.counts]
            body["ks"] = list(self.ks)
            if self.greedy_counts is not None:
                body["greedy_tasks"] = [c.to_json() for c in self.greedy_counts]
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "EvalResult":
        """What `to_json()` wrote, without trajectories: enough for every metric and comparison.

        Raises:
            DataError: the counts by task are not in it (it was written with tasks=False).
        """
        if "tasks" not in body:
            raise DataError('this evaluation has no "tasks": it was written without counts by task; evaluate again')
        greedy = body.get("greedy_tasks")
        metrics = [m for m in body if (m.startswith("pass@") or m == "greedy") and body[m].get("chance") is not None]
        return cls(
            counts=tuple(TaskCounts(**c) for c in body["tasks"]),
            ks=tuple(body["ks"]),
            seed=body["seed"],
            sampling=body["sampling"],
            greedy_counts=None if greedy is None else tuple(TaskCounts(**c) for c in greedy),
            chance={m: body[m]["chance"] for m in metrics},
            entropy=EntropyStats.from_json(body["entropy_nats"]),
            mean_tokens=body["mean_tokens"],
            truncated_share=body["truncated_share"],
            num_samples=body["num_samples"],
            num_tokens=body["num_tokens"],
            seconds=body["seconds"],
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much better one side is than the other on the same tasks."""

    name: str
    gain: Estimate
    """Mean over tasks of after - before: paired bootstrap, 95%, BCa."""
    before: float
    after: float
    """The two means over the tasks compared."""
    left_out: tuple[str, ...]
    """Tasks without a value on one of the sides."""

    def to_json(self) -> dict[str, Any]:
        return {
            **self.gain.to_json(),
            "before": self.before,
            "after": self.after,
            "tasks": self.gain.count,
            "tasks_left_out": len(self.left_out),
        }


def compare(
    before: EvalResult, after: EvalResult, *, metric: str = "pass@1", before_metric: str | None = None, name: str = ""
) -> Comparison:
    """The gain of `after` over `before`, paired by task.

    Args:
        metric: "pass@k" or "greedy", read from both sides unless `before_metric` names another for `before` (a trained
            model's pass@1 against the base model's greedy accuracy).

    Raises:
        DataError: the two evaluations are not of the same tasks, or no task has a value on both sides.
    """
    ids = {c.task_id for c in before.counts}, {c.task_id for c in after.counts}
    if ids[0] != ids[1]:
        raise DataError(
            f"a paired gain needs the same tasks on both sides; {len(ids[0] - ids[1])} are only before, "
            f"{len(ids[1] - ids[0])} only after. Evaluate both models on one task set."
        )
    old, new = before.by_task(before_metric or metric), after.by_task(metric)
    shared = sorted(old.keys() & new.keys())
    if not shared:
        raise DataError(f"no task has a value of {metric} on both sides: sample more, or look at the verifier's errors")
    gain = paired_gain({i: old[i] for i in shared}, {i: new[i] for i in shared}, seed=after.seed)
    mean_old, mean_new = (sum(side[i] for i in shared) / len(shared) for side in (old, new))
    left_out = tuple(c.task_id for c in after.counts if c.task_id not in old or c.task_id not in new)
    return Comparison(name=name or metric, gain=gain, before=mean_old, after=mean_new, left_out=left_out)


def compare_controls(
    trained: EvalResult, controls: Mapping[str, tuple[EvalResult, str]], *, metric: str = "pass@1"
) -> dict[str, dict[str, Any]]:
    """The trained model's `metric` minus each control's, paired by task.

    Args:
        controls: name -> (its evaluation, the metric that represents it), e.g. {"base greedy": (base, "greedy")}.

    Returns:
        name -> {"value", "ci95", "chance", ...} of the control itself and "gain": {"value", "ci95", ...}.
    """
    return {
        name: {
            **result.metric_json(own),
            "metric": own,
            "gain": compare(result, trained, metric=metric, before_metric=own, name=name).to_json(),
        }
        for name, (result, own) in controls.items()
    }


def comparison_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, float, float, float, tuple[float, float]]]:
    """(name, before, after, gain, its 95% interval) of each, for a text table."""
    return [(c.name, c.before, c.after, c.gain.value, (c.gain.low, c.gain.high)) for c in comparisons]
