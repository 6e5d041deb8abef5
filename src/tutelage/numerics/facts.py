"""Closed-form facts about sampling and selection, for tests, reports and monitors. Plain Python, no tensors."""

import math
from itertools import pairwise

from tutelage.errors import ConfigError


def accepted_kl(accept_probability: float) -> float:
    """KL(accepted || policy) in nats: the policy's own samples, conditioned on being accepted, lie -ln p from it.

    >>> round(accepted_kl(0.25), 4)
    1.3863
    """
    if not 0 < accept_probability <= 1:
        raise ConfigError(f"accept_probability must be in (0, 1], got {accept_probability}: nothing would be accepted")
    return max(0.0, -math.log(accept_probability))


def best_of_k_kl_bound(k: int) -> float:
    """Upper bound in nats of KL(best of k || policy): ln k - (k - 1) / k. Exact where no two rewards are equal.

    Source:
        Beirami et al. 2024, arXiv:2401.01879 (bound, with equality conditions).
    """
    _check_count("k", k)
    return math.log(k) - (k - 1) / k


def expected_max_of_normals(k: int) -> float:
    """E[max of k independent standard normals], in standard deviations: what best-of-k gains on Gaussian rewards.

    Composite Simpson's rule on the integral of x k phi(x) Phi(x)^(k-1); absolute error below 1e-9 to k = 10^6.
    """
    _check_count("k", k)
    steps, bound = 4000, 10.0
    grid = [-bound + 2 * bound * i / steps for i in range(steps + 1)]

    def density(x: float) -> float:
        below = 0.5 * math.erfc(-x / math.sqrt(2))
        return x * k * math.exp(-x * x / 2) / math.sqrt(2 * math.pi) * below ** (k - 1)

    values = [density(x) for x in grid]
    middles = [density((a + b) / 2) for a, b in pairwise(grid)]
    inner = math.fsum(values[1:-1])
    return (2 * bound / steps) / 6 * (values[0] + values[-1] + 2 * inner + 4 * math.fsum(middles))


def all_same_probability(p: float, n: int) -> float:
    """Chance that n independent tries with success probability p all succeed or all fail: p^n + (1 - p)^n."""
    _check_count("n", n)
    if not 0 <= p <= 1:
        raise ConfigError(f"p must be in [0, 1], got {p}")
    return float(p**n + (1 - p) ** n) if n > 0 else 1.0


def mixed_probability(p: float, n: int) -> float:
    """Chance that a group of n has both a success and a failure, so that a group baseline teaches something."""
    return 1.0 - all_same_probability(p, n)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")
