"""What signals share: rows from a draw, and a divisor that says what it counts."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from tutelage.errors import ConfigError
from tutelage.types import Draw, Status, TargetRow, Trajectory

Divisor = Literal["targets", "sampled", "sequences"]
DIVISORS = ("targets", "sampled", "sequences")


def check_divisor(divisor: str) -> None:
    """Raise ConfigError unless the divisor is one of the three."""
    if divisor not in DIVISORS:
        raise ConfigError(f"divisor must be one of {', '.join(DIVISORS)}; got {divisor!r}")


def rows_of(draw: Draw, divisor: Divisor) -> list[TargetRow]:
    """One row per trajectory that counts, with `weight_C`.

    "targets" and "sequences" count what is kept. "sampled" counts every sampled token of the draw, whether kept or
    not, so that the step is the mean over samples; an error verdict takes its sample out of the count as well.
    """
    out = []
    for t in draw:
        is_error = t.verdict is not None and t.verdict.status is Status.ERROR
        is_kept = t.weight != 0 and t.num_targets > 0
        if is_kept or (divisor == "sampled" and t.num_targets > 0 and not is_error):
            columns = {"weight_C": np.full(t.num_targets, t.weight if is_kept else 0.0)}
            out.append(TargetRow(trajectory=t, columns=columns, count=count_of(t, divisor)))
    return out


def count_of(trajectory: Trajectory, divisor: Divisor) -> float:
    """What one trajectory adds to the step's divisor."""
    return 1.0 if divisor == "sequences" else float(trajectory.num_targets)


class Stateless:
    """The parts of `Signal` that a signal without state shares."""

    def annotate(self, batch: Any) -> Mapping[str, Any]:
        return {}

    def after_step(self, policy: Any) -> None:
        """Nothing changes between updates."""

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
