"""What samples say about a policy's spread: entropies, distinct solutions, novelty, balance. All entropies in nats.

Token entropies are the exact ones the sampler stored, of the model's unshaped distribution at each sampled position,
the stop token included. They describe the policy only where the samples do: use samples drawn at temperature 1 and
top-p 1, all of them, never the accepted ones alone.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.errors import DataError
from tutelage.numerics.statistics import expected_distinct
from tutelage.types import Trajectory, content_hash

LOW_ENTROPY_NATS = 0.01
"""Below this a token is as good as decided (Wang et al. 2025 count half of Qwen3-8B's tokens there)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyStats:
    """Estimators e1 to e3 over one set of samples. Fields are None where the samples do not carry what they need."""

    token_mean: float | None
    """e1: mean over all sampled tokens, nats."""
    sequence_mean: float | None
    """e1: mean over samples of each sample's own mean, nats: long samples weigh no more than short ones."""
    p80: float | None
    """e3: 80th percentile of the token entropies, nats."""
    low_share: float | None
    """e3: share of tokens below 0.01 nats."""
    monte_carlo: float | None
    """e2: mean of -log pi over the sampled tokens, nats: an estimate of `token_mean` that needs no entropies. Only from
    samples at temperature 1 and top-p 1 whose log-probabilities are known."""
    gap: float | None
    """e2 - e1 over the tokens that have both, nats: near 0 unless entropies and samples come from different models."""
    num_tokens: int
    """Tokens with a known entropy."""
    num_sequences: int
    num_unknown: int
    """Samples with no known entropy: left out of e1 and e3."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "EntropyStats":
        return cls(**fields)


def sampled_entropies(trajectory: Trajectory) -> list[float] | None:
    """Entropy of each sampled token, in order; None unless every sampled span carries them."""
    out: list[float] = []
    for span in trajectory.spans:
        if span.is_sampled:
            if span.entropies is None:
                return None
            out.extend(span.entropies)
    return out or None


def sampled_surprisals(trajectory: Trajectory) -> list[float] | None:
    """-log pi of each sampled token; None unless every sampled span was drawn at temperature 1, top-p 1 and says so."""
    out: list[float] = []
    for span in trajectory.spans:
        if span.is_sampled:
            known = span.logprobs is not None and span.is_context_exact
            if not known or span.sampling is None or not span.sampling.samples_own_distribution:
                return None
            out.extend(-x for x in span.logprobs or ())
    return out or None


def entropy_stats(trajectories: Iterable[Trajectory]) -> EntropyStats:
    """Token entropies of samples, averaged by token and by sequence, with the sampled estimate beside them."""
    per_sequence: list[list[float]] = []
    surprisals: list[float] = []
    differences: list[float] = []
    unknown = 0
    for t in trajectories:
        entropies, surprisal = sampled_entropies(t), sampled_surprisals(t)
        if entropies is None:
            unknown += 1
        else:
            per_sequence.append(entropies)
        if surprisal is not None:
            surprisals.extend(surprisal)
            if entropies is not None:
                differences.extend(s - h for s, h in zip(surprisal, entropies, strict=True))
    tokens = np.array([h for seq in per_sequence for h in seq], dtype=np.float64)
    return EntropyStats(
        token_mean=float(tokens.mean()) if tokens.size else None,
        sequence_mean=float(np.mean([np.mean(s) for s in per_sequence])) if per_sequence else None,
        p80=float(np.quantile(tokens, 0.8)) if tokens.size else None,
        low_share=float((tokens < LOW_ENTROPY_NATS).mean()) if tokens.size else None,
        monte_carlo=float(np.mean(surprisals)) if surprisals else None,
        gap=math.fsum(differences) / len(differences) if differences else None,
        num_tokens=int(tokens.size),
        num_sequences=len(per_sequence) + unknown,
        num_unknown=unknown,
    )


# -- solutions ----------------------------------------------------------------------------------


def solution_key(trajectory: Trajectory) -> str:
    """The task's own notion of "the same solution" if the verdict carries one, else the text without outer blanks."""
    verdict = trajectory.verdict
    return verdict.key if verdict is not None and verdict.key is not None else trajectory.completion.strip()


def answer_entropy(keys: Sequence[Hashable]) -> float:
    """e4: entropy of the answers to one prompt, -sum f log f over their shares f, nats.

    The plug-in estimate: it is low by about (kinds - 1) / (2 samples), so compare equal numbers of samples only.

    Raises:
        DataError: no answer.
    """
    if not keys:
        raise DataError("answer entropy needs at least one answer, got none")
    counts = np.array(list(Counter(keys).values()), dtype=np.float64)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) if len(counts) > 1 else 0.0


def distinct_n(keys: Sequence[Hashable], n: int) -> float:
    """e5: distinct solutions expected among n of the samples, without bias from however many there are (>= n)."""
    return expected_distinct(list(Counter(keys).values()), n)


def distinct_ngrams(sequences: Iterable[Sequence[int]], n: int) -> float:
    """Distinct n-grams of token ids over all n-grams; 0 where no sequence is n long. Depends on the amount of text."""
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def duplicate_share(keys_by_task: Mapping[str, Sequence[Hashable]]) -> float | None:
    """1 - distinct / accepted over the accepted samples of all tasks; None where nothing was accepted."""
    accepted = sum(len(keys) for keys in keys_by_task.values())
    return 1 - sum(len(set(keys)) for keys in keys_by_task.values()) / accepted if accepted else None


def balance_score(distinct_accepted: int, kept: int, *, target: int = 8) -> float:
    """B-STaR's balance of exploration and exploitation for one query: min(n' / n*, 1) * n' / n.

    Args:
        distinct_accepted: n', the distinct correct responses among those kept.
        kept: n, all responses kept.
        target: n*, how many distinct correct ones are enough.

    Source:
        Zeng et al. 2024, arXiv:2412.17256; n* = 8 as in the released code. A query with nothing kept scores 0.
    """
    if not 0 <= distinct_accepted <= max(kept, 0) or target < 1:
        raise DataError(
            f"balance_score needs 0 <= distinct <= kept, target >= 1; got {distinct_accepted}, {kept}, {target}"
        )
    return min(distinct_accepted / target, 1.0) * distinct_accepted / kept if kept else 0.0


class NoveltyHistory:
    """Every accepted solution seen so far, as hashes, so that what is new can be told from what is a repeat."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, keys_by_task: Mapping[str, Sequence[str]]) -> tuple[float | None, list[str]]:
        """Takes in a round's accepted solutions, repeats included.

        Returns:
            novelty: distinct solutions never seen before over all accepted; None where nothing was accepted.
            fresh: their hashes, sorted, for `forget`.
        """
        accepted = sum(len(keys) for keys in keys_by_task.values())
        fresh = {content_hash(task, key) for task, keys in keys_by_task.items() for key in keys} - self._seen
        self._seen |= fresh
        return (len(fresh) / accepted if accepted else None), sorted(fresh)

    def forget(self, fresh: Iterable[str]) -> None:
        """Undoes an `add`: a round that was taken back was never seen."""
        self._seen -= set(fresh)

    def state(self) -> dict[str, Any]:
        return {"seen": sorted(self._seen)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._seen = set(state["seen"])
