"""Advantages of a draw's groups, and sums over a trajectory's future. Plain Python in float64: groups are ragged.

`rewards_P_G[p][g]` is the reward of sample g of prompt p. A sample whose verdict is an error is not valid: it leaves
its group's statistics and gets advantage 0.
"""

import math
from collections.abc import Callable, Sequence

from tutelage.errors import ConfigError, DataError


def group_advantages(
    rewards_P_G: Sequence[Sequence[float]],
    kind: str,
    *,
    is_valid_P_G: Sequence[Sequence[bool]] | None = None,
    ddof: int = 0,
    eps: float = 0.0,
    accept_above: float | None = 0.0,
) -> list[list[float]]:
    """Advantage of every sample, group by group.

    Over a group's valid samples, with mean and std of their rewards:

    | kind | advantage |
    |---|---|
    | `reinforce` | r |
    | `reinforce_rej` | r, and 0 for groups whose rewards are all the same |
    | `raft` | 1 where r is the group's best and above `accept_above`, else 0 |
    | `accepted` | 1 where r is above `accept_above`, else 0 |
    | `rloo` | r - mean of the others |
    | `grpo` | (r - mean) / (std + eps) |
    | `grpo_no_std` | r - mean |

    Groups whose rewards are all the same (`all_same`) give exactly 0 for reinforce_rej, rloo, grpo and grpo_no_std, as
    does a group of one.

    Args:
        is_valid_P_G: False takes a sample out. None: all valid.
        ddof: 0 divides the variance by n (the paper's std), 1 by n - 1 (what most libraries compute).
        eps: added to the std. 0 is the definition; libraries add 1e-6 or 1e-4.
        accept_above: None accepts whatever the reward (raft: the best of every group).

    Raises:
        ConfigError: unknown kind, or ddof not 0 or 1. DataError: lengths differ, or a valid reward is not finite.

    Source:
        Xiong et al. 2025, arXiv:2504.11343 (reinforce, reinforce_rej, raft); Ahmadian et al. 2024,
        arXiv:2402.14740 (rloo); Shao et al. 2024, arXiv:2402.03300 (grpo); Liu et al. 2025, arXiv:2503.20783
        (grpo_no_std). RAFT's paper keeps the best of every group; rewards of 0 and -1 are never accepted here
        unless `accept_above` says so.

    >>> group_advantages([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0]], "grpo")
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0]]
    """
    problems = []
    if kind not in _KINDS:
        problems.append(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if ddof not in (0, 1):
        problems.append(f"ddof must be 0 or 1, got {ddof}")
    if problems:
        raise ConfigError(problems)
    if is_valid_P_G is None:
        is_valid_P_G = [[True] * len(group) for group in rewards_P_G]
    if [len(g) for g in is_valid_P_G] != [len(g) for g in rewards_P_G]:
        raise DataError(
            f"group_advantages needs one flag per reward; got groups of {[len(g) for g in rewards_P_G]} rewards and "
            f"{[len(g) for g in is_valid_P_G]} flags"
        )
    out = []
    for p, (rewards, is_valid) in enumerate(zip(rewards_P_G, is_valid_P_G, strict=True)):
        valid = [float(r) for r, ok in zip(rewards, is_valid, strict=True) if ok]
        if not all(math.isfinite(r) for r in valid):
            raise DataError(f"rewards must be finite, group {p} has {valid}: mark verdicts of error as not valid")
        values = iter(_KINDS[kind](valid, ddof, eps, accept_above) if valid else [])
        out.append([next(values) if ok else 0.0 for ok in is_valid])
    return out


def _reinforce(rewards: list[float], ddof: int, eps: float, accept_above: float | None) -> list[float]:
    return list(rewards)


def _reinforce_rej(rewards: list[float], ddof: int, eps: float, accept_above: float | None) -> list[float]:
    return [0.0] * len(rewards) if all_same(rewards) else list(rewards)


def _raft(rewards: list[float], ddof: int, eps: float, accept_above: float | None) -> list[float]:
    best = max(rewards)
    return [float(all_same([r, best]) and (accept_above is None or r > accept_above)) for r in rewards]


def _accepted(rewards: list[float], ddof: int, eps: float, accept_above: float | None) -> list[float]:
    return [float(accept_above is None or r > accept_above) for r in rewards]


def _rloo(rewards: list[float], ddof: int, eps: float, accept_above: float | None) -> list[float]:
    if all_same(rewards):
        return [0.0] * len(rewards)
    total, others = math.fsum(rewards), len(rewards) - 1
    return [r - (total - r) / others for r in rewards]


def _grpo(rewards: list[float], ddof: int, eps: float, accept_above: float | None) -> list[float]:
    if all_same(rewards):
        return [0.0] * len(rewards)
    centred = _grpo_no_std(rewards, ddof, eps, accept_above)
    std = math.sqrt(math.fsum(c * c for c in centred) / (len(rewards) - ddof))
    return [c / (std + eps) for c in centred]


def _grpo_no_std(rewards: list[float], ddof: int, eps: float, accept_above: float | None) -> list[float]:
    if all_same(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [r - mean for r in rewards]


_KINDS: dict[str, Callable[[list[float], int, float, float | None], list[float]]] = {
    "reinforce": _reinforce,
    "reinforce_rej": _reinforce_rej,
    "raft": _raft,
    "accepted": _accepted,
    "rloo": _rloo,
    "grpo": _grpo,
    "grpo_no_std": _grpo_no_std,
}


def all_same(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards are one number, to the rounding of sums: a spread under 1e-9 of the largest.

    >>> all_same([0.3, 0.1 + 0.2])
    True
    """
    return math.isclose(max(rewards), min(rewards), rel_tol=1e-9, abs_tol=1e-15)


def future_sums(values_L: Sequence[float], *, discount: float = 1.0, average: bool = False) -> list[float]:
    """Discounted sum of what comes after each entry of one trajectory, the entry itself not included.

    out[i] = sum_{j > i} discount^(j - i) * values[j]

    Args:
        values_L: one value per target of one trajectory, in order; environment tokens are not among them.
        discount: in [0, 1]. 0 gives zeros.
        average: divide by the weight of the terms, sum_{j > i} discount^(j - i): MiniLLM's length normalisation
            at discount 1. The last entry is 0.

    Raises:
        ConfigError: discount outside [0, 1].

    Source:
        Gu et al. 2023 (MiniLLM), arXiv:2306.08543, section 2.2.

    >>> future_sums([1.0, 2.0, 4.0])
    [6.0, 4.0, 0.0]
    """
    if not 0 <= discount <= 1:
        raise ConfigError(f"discount must be in [0, 1], got {discount}")
    out, total, weight = [0.0] * len(values_L), 0.0, 0.0
    for i in range(len(values_L) - 2, -1, -1):
        total = discount * (values_L[i + 1] + total)
        weight = discount * (1.0 + weight)
        out[i] = total / weight if average and weight > 0 else total
    return out
