"""The regression gate: a round that measurably made the model worse is taken back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.errors import CheckpointError, DataError
from tutelage.monitors.criteria import gain_between
from tutelage.monitors.probe import Probe
from tutelage.types import Draw, DrawContext, MonitorReport

CONTINUE, REGRESSED, INSUFFICIENT = "CONTINUE", "REGRESSED", "INSUFFICIENT"


@dataclass(frozen=True, kw_only=True)
class RegressionSettings:
    """When a round counts as a loss."""

    k: int = 1
    """pass@k that is compared."""
    in_a_row: int = 2
    """Regressed rounds in a row that stop the stage."""
    min_steps: int = 2
    """Rounds of fewer optimiser steps are not gated: on-policy distillation and RL probe by steps instead."""
    seed: int = 0
    """Of the bootstrap."""


class RegressionGate:
    """After each round, the probe set against the round before and against base.

    REGRESSED where the upper 95% bound of either gain (paired bootstrap over prompts) is below 0: weights and optimiser
    go back to the round before, the cursor goes on. Two regressed rounds in a row stop the stage. A round that was
    taken back is no reference for the next, nor is one that could not be compared, whose weights stay.

    Args:
        probe: makes a probe from a draw's context (a `Prober`); None where the run calls `update` itself.
    """

    def __init__(
        self, settings: RegressionSettings | None = None, *, probe: Callable[[DrawContext], Probe] | None = None
    ) -> None:
        self.settings = settings or RegressionSettings()
        self._probe = probe
        self._base: Probe | None = None
        self._kept: Probe | None = None
        self._last_step = 0
        """Updates counted at the newest probe, kept or not: where the round began."""
        self._start_step = 0
        """Whose weights the round began with: an earlier step's where a round was taken back."""
        self._regressed_in_a_row = 0

    def start(self, ctx: DrawContext) -> MonitorReport | None:
        """Probes base, before the first update. A resumed gate has it already and gives None."""
        return None if self._base is not None or self._probe is None else self.update(self._probe(ctx))

    def after_round(self, draw: Draw, ctx: DrawContext) -> MonitorReport:
        """Probes and compares.

        Raises:
            DataError: the gate was built without a probe.
        """
        if self._probe is None:
            raise DataError("RegressionGate.after_round needs a probe: build it with probe=Prober(...), or call update")
        return self.update(self._probe(ctx))

    def update(self, probe: Probe) -> MonitorReport:
        """Compares one more round. The first probe is base, and nothing is compared with it yet.

        Raises:
            DataError: the probe is not of the same tasks as base.
        """
        if self._base is None or self._kept is None:
            self._base = self._kept = probe.without_keys()
            self._last_step = self._start_step = probe.step
            return MonitorReport(verdict=CONTINUE, evidence={"step": probe.step, "gated": False, "why": "this is base"})
        if set(self._base.task_ids) != set(probe.task_ids):
            raise DataError(
                f"the regression gate needs the probe set of base ({len(self._base.tasks)} tasks), "
                f"got {len(probe.tasks)} tasks at step {probe.step} that are not the same"
            )
        steps, self._last_step = probe.step - self._last_step, probe.step
        if 0 <= steps < self.settings.min_steps:
            self._kept, self._start_step = probe.without_keys(), probe.step
            why = f"a round of {steps} optimiser step{'s' * (steps != 1)} is not gated"
            return MonitorReport(verdict=CONTINUE, evidence={"step": probe.step, "gated": False, "why": why})
        s, references = self.settings, {"round before": self._kept, "base": self._base}
        gains = {name: gain_between(old, probe, s.k, seed=s.seed) for name, old in references.items()}
        known = {name: g for name, g in gains.items() if g is not None}
        lost = [name for name, g in known.items() if g.high < 0]
        said = "; ".join(
            f"pass@{s.k} {g.value:+.1%} [{g.low:+.1%}, {g.high:+.1%}] against {name}" for name, g in known.items()
        )
        evidence: dict[str, Any] = {
            "step": probe.step,
            "gated": True,
            "gains": {name: None if g is None else g.to_json() for name, g in gains.items()},
            "lost_against": lost,
        }
        if not known:
            self._start_step = probe.step  # not judged, and trained on
            missing = f"no prompt has {s.k} judged samples in both probes: the round cannot be compared"
            return MonitorReport(verdict=INSUFFICIENT, evidence={**evidence, "why": missing})
        if not lost:
            self._kept, self._start_step, self._regressed_in_a_row = probe.without_keys(), probe.step, 0
            return MonitorReport(verdict=CONTINUE, evidence={**evidence, "why": said, "regressed_in_a_row": 0})
        self._regressed_in_a_row += 1
        stop = self._regressed_in_a_row >= s.in_a_row
        why = f"{said}: worse than {' and '.join(lost)} beyond chance, back to step {self._start_step}"
        why += f"; {self._regressed_in_a_row} rounds in a row regressed, the stage ends" if stop else ""
        evidence |= {"why": why, "regressed_in_a_row": self._regressed_in_a_row, "revert_to_step": self._start_step}
        return MonitorReport(verdict=REGRESSED, should_revert=True, should_stop=stop, evidence=evidence)

    def state(self) -> dict[str, Any]:
        return {
            "base": None if self._base is None else self._base.to_json(),
            "kept": None if self._kept is None else self._kept.to_json(),
            "last_step": self._last_step,
            "start_step": self._start_step,
            "regressed_in_a_row": self._regressed_in_a_row,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on as if never stopped.

        Raises:
            CheckpointError: the state is not one of a regression gate.
        """
        absent = sorted({"base", "kept", "last_step", "start_step", "regressed_in_a_row"} - state.keys())
        if absent:
            raise CheckpointError(f"a regression gate's state needs {absent}, it has {sorted(state)}")
        self._base = None if state["base"] is None else Probe.from_json(state["base"])
        self._kept = None if state["kept"] is None else Probe.from_json(state["kept"])
        self._last_step, self._start_step = int(state["last_step"]), int(state["start_step"])
        self._regressed_in_a_row = int(state["regressed_in_a_row"])
