"""How far a policy has moved, in nats, from samples scored by two models; and how likely it finds demonstrations.

KL(P || Q) is E over samples of P of log P - log Q. Forward KL to base, KL(base || policy), therefore needs samples of
the *base* model scored by the policy; reverse KL, KL(policy || base), the policy's own samples scored by the base.
"""

import math
from collections.abc import Sequence

from tutelage.errors import DataError
from tutelage.numerics.statistics import Estimate, ratio_over_tasks
from tutelage.types import Scorer, Trajectory


def sampled_kl(trajectories: Sequence[Trajectory], scorer: Scorer, *, seed: int = 0) -> Estimate:
    """KL(author of the samples || model of the scorer), nats per token, with a cluster bootstrap over tasks.

    kl = sum over samples and targets of (log p_author - log p_scorer) / number of targets

    An unbiased estimate of the summed KL over whole completions (k1); single samples may be negative, and so may the
    estimate where the two models are nearly the same. Only for samples drawn at temperature 1 and top-p 1, all of them.

    Raises:
        DataError: there is no sample, or one has unknown log-probabilities, was drawn from a shaped distribution, or is
            scored at another length.
    """
    pairs = []
    scores = scorer.score(trajectories)
    if len(scores) != len(trajectories):
        raise DataError(f"a scorer must score each of {len(trajectories)} trajectories, it scored {len(scores)}")
    for t, other in zip(trajectories, scores, strict=True):
        own = _own_logprobs(t)
        if len(own) != len(other):
            raise DataError(f"trajectory {t.id!r} has {len(own)} targets, its scores have {len(other)}")
        pairs.append((t.task_id, math.fsum(own) - math.fsum(other), len(own)))
    return _per_token(pairs, seed)


def mean_nll(trajectories: Sequence[Trajectory], scorer: Scorer, *, seed: int = 0) -> Estimate:
    """Mean of -log p over the targets of held-out demonstrations, nats per token, cluster bootstrap over tasks.

    Raises:
        DataError: there is nothing to score, or a score that is not finite.
    """
    return _per_token(_nll(trajectories, scorer), seed)


def nll_by_task(trajectories: Sequence[Trajectory], scorer: Scorer) -> dict[str, float]:
    """Task id -> -log p over all its demonstrations' targets, nats per token.

    Raises:
        DataError: as `mean_nll`.
    """
    return {task_id: nats / tokens for task_id, (nats, tokens) in _totals(_nll(trajectories, scorer)).items()}


def _nll(trajectories: Sequence[Trajectory], scorer: Scorer) -> list[tuple[str, float, int]]:
    pairs = []
    for t, logprobs in zip(trajectories, scorer.score(trajectories), strict=True):
        total = -math.fsum(logprobs)
        if not math.isfinite(total):
            raise DataError(f"trajectory {t.id!r} has a log-probability that is not finite: {total} nats in all")
        pairs.append((t.task_id, total, len(logprobs)))
    return pairs


def _own_logprobs(trajectory: Trajectory) -> list[float]:
    for span in trajectory.spans:
        if span.is_trainable and (span.sampling is None or not span.sampling.samples_own_distribution):
            raise DataError(
                f"a KL from samples needs them drawn at temperature 1 and top-p 1; trajectory {trajectory.id!r} was "
                f"drawn with {span.sampling}"
            )
    logprobs = trajectory.behaviour_logprobs
    if logprobs is None:
        raise DataError(f"trajectory {trajectory.id!r} has unknown log-probabilities: sample with them, or score it")
    return [p for p, is_target in zip(logprobs, trajectory.is_target, strict=True) if is_target]


def _totals(pairs: Sequence[tuple[str, float, int]]) -> dict[str, tuple[float, int]]:
    """Task id -> (nats, target tokens), for the tasks with a target."""
    totals: dict[str, tuple[float, int]] = {}
    for task_id, nats, tokens in pairs:
        old = totals.get(task_id, (0.0, 0))
        totals[task_id] = (old[0] + nats, old[1] + tokens)
    used = {task_id: v for task_id, v in totals.items() if v[1] > 0}
    if not used:
        raise DataError("nats per token need at least one target token, got none")
    return used


def _per_token(pairs: Sequence[tuple[str, float, int]], seed: int) -> Estimate:
    used = _totals(pairs).values()
    return ratio_over_tasks([n for n, _ in used], [t for _, t in used], seed=seed)
