"""What signals share: rows from a draw, and a divisor that says what it counts."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tutelage.data.token_file import TokenFile
from tutelage.errors import ConfigError, DataError
from tutelage.types import Draw, Status, TargetRow, Trajectory

Divisor = Literal["targets", "sampled", "sequences"]
DIVISORS = ("targets", "sampled", "sequences")


def check_divisor(divisor: str) -> None:
    """Raise ConfigError unless the divisor is one of the three."""
    if divisor not in DIVISORS:
        raise ConfigError(f"divisor must be one of {', '.join(DIVISORS)}; got {divisor!r}")


class LazyRows(Sequence[TargetRow]):
    """Rows of trajectories that lie on disk: each is made when it is asked for.

    Args:
        num_targets: (rows,) of each trajectory. weights: (rows,) of each trajectory.
    """

    def __init__(
        self, kept: Sequence[Trajectory], num_targets: np.ndarray, weights: np.ndarray, divisor: Divisor
    ) -> None:
        self._kept, self._divisor = kept, divisor
        self.is_trained = (weights != 0) & (num_targets > 0)
        """(rows,) what `TargetRow.is_trained` would say, without making the rows."""

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        t = self._kept[index]
        columns = {"weight_C": np.full(t.num_targets, t.weight)}
        return TargetRow(trajectory=t, columns=columns, count=count_of(t, self._divisor))


def rows_of(draw: Draw, divisor: Divisor) -> Sequence[TargetRow]:
    """One row per trajectory that counts, with `weight_C`.

    "targets" and "sequences" count what is kept. "sampled" counts every sampled token of the draw, whether kept or
    not, so that the step is the mean over samples; an error verdict takes its sample out of the count as well.
    """
    if isinstance(kept := getattr(draw, "tokens", None), TokenFile):  # on disk: rows are made one by one
        if divisor == "sampled":
            raise DataError(
                "a draw on disk keeps the tokens of what is trained on only: divisor=sampled needs the rest"
            )
        return LazyRows(kept, kept.num_targets, kept.weights, divisor)
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
