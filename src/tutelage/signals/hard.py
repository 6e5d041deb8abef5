"""Hard targets: the negative log-likelihood of the tokens their author chose."""

from collections.abc import Callable, Sequence

from tutelage.numerics.losses import cross_entropy
from tutelage.signals.base import Divisor, Stateless, check_divisor, rows_of
from tutelage.types import Draw, Targets, Trajectory


class HardTargets(Stateless):
    """Maximum likelihood on the kept trajectories' targets.

    loss = - sum_i w_i log p(y_i | y_<i) / divisor, in nats.

    Args:
        divisor: what a step is averaged over: "targets" (tokens trained on; the default), "sequences", or "sampled"
            (all sampled tokens, rejected ones included: with `Accepted` this is exactly the policy gradient with a
            reward in {0, 1} on the first update after a draw).
    """

    loss = cross_entropy
    """(C,) nats: -log p of `target_ids_C`, with a hand-written gradient for the chunked path."""

    def __init__(self, *, divisor: Divisor = "targets") -> None:
        check_divisor(divisor)
        self.divisor: Divisor = divisor

    def prepare(self, draw: Draw, *, score_student: Callable[[Sequence[Trajectory]], list[Sequence[float]]]) -> Targets:
        rows = rows_of(draw, self.divisor)
        return Targets(rows=rows, divisor=self.divisor, stats={"data/num_rows": float(len(rows))})
