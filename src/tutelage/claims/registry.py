"""The claims in the chapter's order. A claim's module is imported when it is asked for."""

from importlib import import_module

from tutelage.claims.base import Claim
from tutelage.errors import ConfigError

CLAIMS: tuple[str, ...] = (
    "one_objective",  # 1
    "compounding",  # 2
    "overwriting",  # 3
    "small_models",  # 4
    "off_policy_distillation",  # 5
    "on_policy_distillation",  # 6
    "on_policy_walks",  # 6
    "distillation_compute",  # 7
    "first_order",  # 8
    "entropy_collapse",  # 9
    "same_reward_groups",  # 10
    "graduation",  # 11
    "r1_plan",  # 12
    "distinct_paths",  # 13
)
"""Each is a module `tutelage.claims.NAME` with a `CLAIM`."""


def load(name: str) -> Claim:
    """One claim.

    Raises:
        ConfigError: unknown name.
    """
    if name not in CLAIMS:
        raise ConfigError(f"claim {name!r} is unknown; known: {', '.join(CLAIMS)}")
    claim: Claim = import_module(f"tutelage.claims.{name}").CLAIM
    if claim.name != name:
        raise ConfigError(f"module tutelage.claims.{name} holds the claim {claim.name!r}: the names must be the same")
    return claim


def load_all() -> list[Claim]:
    """Every claim, in order."""
    return [load(name) for name in CLAIMS]
