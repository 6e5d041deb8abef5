"""The graduation monitor: has imitation stopped paying, and what should come next?

GRADUATE         (G1 or G2) and G3 and G4 and G5: entropy is spent, pass@1 is flat, and RL has something to work with
STOP_NARROWING   coverage has fallen, even if pass@1 rises
NEED_TEACHER     G3 and not G4: flat, and nothing to sharpen
FIX_PROMPTS      G4 and not G5: there is headroom, but groups of RL's size are too often all right or all wrong
INSUFFICIENT     the evidence does not decide GRADUATE yet; what is missing is named
CONTINUE         otherwise

Conditions are three-valued: one that cannot be said yet is neither true nor false, and only decides where the others
leave it no choice. A verdict other than CONTINUE and INSUFFICIENT is settled when 2 of the last 3 probes say it.
Never on entropy alone: absolute entropies mean nothing across models, and token entropy may fall while paths stay
distinct.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tutelage.errors import CheckpointError, DataError
from tutelage.monitors.criteria import (
    PASS,
    Criterion,
    GraduationSettings,
    balance_flat,
    coverage_k,
    drift,
    duplicates,
    entropy_ceiling,
    entropy_ratio,
    entropy_spent,
    group_signal,
    hand_over,
    headroom,
    narrowing,
    pass_at,
    pass_mean,
    plateau,
    token_entropies,
)
from tutelage.monitors.entropy import NoveltyHistory
from tutelage.monitors.practised import Practised, practised
from tutelage.monitors.probe import Probe
from tutelage.types import Draw, DrawContext, MonitorReport

CONTINUE, GRADUATE, STOP_NARROWING = "CONTINUE", "GRADUATE", "STOP_NARROWING"
NEED_TEACHER, FIX_PROMPTS, INSUFFICIENT = "NEED_TEACHER", "FIX_PROMPTS", "INSUFFICIENT"
STOPS = (GRADUATE, STOP_NARROWING, NEED_TEACHER)
"""Settled verdicts that end the stage: going on imitating these samples no longer helps."""
CHEAP_FIXES = (
    "drop all-right groups",
    "cap the samples kept per prompt",
    "raise the sampling temperature",
    "clip higher (0.28)",
    "restart from base with samples pooled over rounds",
)
"""Worth trying before graduating."""


def _all(*conditions: bool | None) -> bool | None:
    return False if False in conditions else None if None in conditions else True


def _any(*conditions: bool | None) -> bool | None:
    return True if True in conditions else None if None in conditions else False


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What one probe says, before hysteresis."""

    verdict: str
    why: str
    missing: tuple[str, ...] = ()


def judge_criteria(criteria: Mapping[str, Criterion], lacking: Sequence[str] = ()) -> Judgement:
    """The overall verdict from the criteria.

    Args:
        lacking: what the probe itself lacks ("128 prompts, there are 40"); then only narrowing is decided.
    """
    holds = {name: c.holds for name, c in criteria.items()}
    if holds["narrowing"]:
        return Judgement(verdict=STOP_NARROWING, why=criteria["narrowing"].why)
    if lacking:
        return Judgement(verdict=INSUFFICIENT, why="the probe set is too small", missing=tuple(lacking))
    spent = _any(holds["G1"], holds["G2"])
    graduate = _all(spent, holds["G3"], holds["G4"], holds["G5"])
    if graduate:
        named = [n for n in ("G1", "G2") if holds[n]] + ["G3", "G4", "G5"]
        return Judgement(verdict=GRADUATE, why="; ".join(f"{n}: {criteria[n].why}" for n in named))
    if holds["G3"] and holds["G4"] is False:
        return Judgement(verdict=NEED_TEACHER, why=f"G3: {criteria['G3'].why}; G4: {criteria['G4'].why}")
    if holds["G4"] and holds["G5"] is False:
        rising = "; imitation itself is still gaining: go on, and fix them before RL" if holds["G3"] is False else ""
        return Judgement(verdict=FIX_PROMPTS, why=f"G5: {criteria['G5'].why}{rising}")
    if graduate is None:
        names = ["G1", "G2"] if spent is None else []
        names = [n for n in (*names, "G3", "G4", "G5") if holds[n] is None]
        missing = tuple(f"{n} needs {criteria[n].missing}" for n in names)
        return Judgement(
            verdict=INSUFFICIENT, why="nothing speaks against graduating, but not all is known", missing=missing
        )
    against = [n for n in ("G3", "G4", "G5") if holds[n] is False]
    against += ["G1", "G2"] if spent is False else []
    return Judgement(verdict=CONTINUE, why="; ".join(f"{n}: {criteria[n].why}" for n in against))


def settle(verdicts: Sequence[str], s: GraduationSettings) -> str:
    """The verdict with hysteresis: the newest that `agree` of the last `of` probes give, else CONTINUE.

    INSUFFICIENT is said at once and stays only as long as the newest probe says it.
    """
    recent = list(verdicts[-s.of :])
    for verdict in reversed(recent):
        if verdict not in (CONTINUE, INSUFFICIENT) and recent.count(verdict) >= s.agree:
            return verdict
    return INSUFFICIENT if recent and recent[-1] == INSUFFICIENT else CONTINUE


class GraduationMonitor:
    """Keeps the history of probes and judges each new one. One monitor a stage: its first probe is the reference.

    Args:
        probe: makes a probe from a draw's context (a `Prober`); None where the run calls `update` itself.
        every_steps: probe only if so many optimiser steps were done since the last one; 0 probes after every round.
    """

    def __init__(
        self,
        settings: GraduationSettings | None = None,
        *,
        probe: Callable[[DrawContext], Probe] | None = None,
        every_steps: int = 0,
    ) -> None:
        self.settings = settings or GraduationSettings()
        self.every_steps = every_steps
        self._probe = probe
        self._history: list[Probe] = []
        self._novelties: list[float | None] = []
        self._verdicts: list[str] = []
        self._fresh: list[list[str]] = []
        self._seen = NoveltyHistory()

    @property
    def history(self) -> tuple[Probe, ...]:
        """Probes so far, without the solutions themselves."""
        return tuple(self._history)

    def due(self, step: int) -> bool:
        """Whether a probe is due after this optimiser step (by steps; 0 leaves it to rounds)."""
        last = self._history[-1].step if self._history else 0
        return self.every_steps > 0 and (not self._history or step - last >= self.every_steps)

    def start(self, ctx: DrawContext) -> MonitorReport | None:
        """The reference probe, before the first update. A resumed monitor has it already and gives None."""
        return None if self._history or self._probe is None else self.update(self._probe(ctx))

    def after_round(self, draw: Draw, ctx: DrawContext) -> MonitorReport:
        """Probes and judges.

        Raises:
            DataError: the monitor was built without a probe.
        """
        if self._probe is None:
            raise DataError(
                "GraduationMonitor.after_round needs a probe: build it with probe=Prober(...), or call update"
            )
        found = practised(draw, self._history)
        return self.update(self._probe(ctx), practice=found)

    def probe_now(self, ctx: DrawContext) -> MonitorReport:
        """Probes within a round, where one is `due`.

        Raises:
            DataError: the monitor was built without a probe.
        """
        if self._probe is None:
            raise DataError("GraduationMonitor.probe_now needs a probe: build it with probe=Prober(...)")
        return self.update(self._probe(ctx))

    def forget_after(self, step: int) -> None:
        """The run went back to this step: later probes were of weights that are gone."""
        while self._history and self._history[-1].step > step:
            self._seen.forget(self._fresh.pop())
            del self._history[-1], self._novelties[-1], self._verdicts[-1]

    def update(self, probe: Probe, *, practice: Practised | None = None) -> MonitorReport:
        """One more probe, and what it means.

        Args:
            practice: the round's draw against the probe before it; evidence, and a word of advice where imitation ends.

        A probe at or before the last one's step says that the run went back: the probes from there on are forgotten.

        Raises:
            DataError: the probe is not of the same tasks as the first: the probe set is fixed for the run.
        """
        if self._history and set(self._history[0].task_ids) != set(probe.task_ids):
            raise DataError(
                f"the probe set is fixed for the run ({len(self._history[0].tasks)} tasks since step "
                f"{self._history[0].step}); the probe at step {probe.step} has {len(probe.tasks)} tasks, "
                f"{len(set(probe.task_ids) - set(self._history[0].task_ids))} of them new. Start a new monitor."
            )
        self.forget_after(probe.step - 1)
        novelty, fresh = self._seen.add({t.task_id: t.keys for t in probe.tasks})
        self._novelties.append(novelty)
        self._fresh.append(fresh)
        self._history.append(probe.without_keys())
        criteria = self.criteria()
        judgement = judge_criteria(criteria, self._lacking(probe))
        if practice is not None and practice.is_by_heart and judgement.verdict in (GRADUATE, STOP_NARROWING):
            judgement = replace(judgement, why=f"{judgement.why}; {practice.why}")
        self._verdicts.append(judgement.verdict)
        settled = settle(self._verdicts, self.settings)
        evidence = self._evidence(probe, criteria, judgement)
        evidence["practised"] = None if practice is None else practice.to_json()
        return MonitorReport(verdict=settled, should_stop=settled in STOPS, evidence=evidence)

    def criteria(self) -> dict[str, Criterion]:
        """Every criterion at the newest probe."""
        s, history = self.settings, self._history
        entropies = token_entropies(history)
        passes = [pass_mean(p, 1) for p in history]
        known = entropies is not None and None not in passes
        now = pass_at(history[-1], 1, seed=s.seed)
        ratio = entropy_ratio(history[0], history[-1], seed=s.seed)
        found = [
            entropy_spent(entropies or [], s, ratio=ratio),
            entropy_ceiling(
                (entropies or []) if known else [],
                [p for p in passes if p is not None],
                s,
                half_width=now.half_width if now is not None else 0.0,
            ),
            plateau(history, s),
            headroom(history, s),
            group_signal(history, s),
            duplicates(history[-1], self._novelties, s),
            balance_flat(history, s),
            hand_over(history, s),
            drift(history, s),
            narrowing(history, s),
        ]
        return {c.name: c for c in found}

    def _lacking(self, probe: Probe) -> list[str]:
        s, judged = self.settings, [t for t in probe.tasks if t.n > 0]
        lacking = []
        if len(judged) < s.min_tasks:
            lacking.append(f"{s.min_tasks} probe prompts with judged samples, there are {len(judged)}")
        if probe.samples < s.min_samples:
            lacking.append(f"{s.min_samples} samples a prompt, there are {probe.samples}")
        return lacking

    def _evidence(self, probe: Probe, criteria: Mapping[str, Criterion], judgement: Judgement) -> dict[str, Any]:
        s, k = self.settings, coverage_k(self._history, self.settings)
        one, wide = pass_at(probe, 1, seed=s.seed), pass_at(probe, k, seed=s.seed) if k >= 1 else None
        chosen = criteria["G8"]
        return {
            "step": probe.step,
            "round": probe.round,
            "verdict_now": judgement.verdict,
            "verdicts": list(self._verdicts[-s.of :]),
            "why": judgement.why,
            "missing": list(judgement.missing),
            "criteria": {name: c.to_json() for name, c in criteria.items()},
            "pass@1": None if one is None else one.to_json(),
            f"pass@{k}": None if wide is None else wide.to_json(),
            "entropy_nats": None if probe.entropy is None else probe.entropy.to_json(),
            "answer_entropy_nats": probe.answer_entropy,
            "novelty": self._novelties[-1],
            "errors": sum(t.errors for t in probe.tasks),
            "hand_over": dict(chosen.details) if chosen.verdict == PASS else None,
            "cheap_fixes": list(CHEAP_FIXES) if judgement.verdict in (GRADUATE, STOP_NARROWING) else [],
            "cost": {
                "probes": len(self._history),
                "probe_seconds": probe.seconds,
                "probe_tokens": probe.tokens,
                "all_seconds": math.fsum(p.seconds for p in self._history),
                "all_tokens": sum(p.tokens for p in self._history),
            },
        }

    def state(self) -> dict[str, Any]:
        """JSON-able: the probes' counts, their verdicts, and the hashes of the solutions each was the first to show."""
        return {
            "history": [p.to_json() for p in self._history],
            "novelties": list(self._novelties),
            "verdicts": list(self._verdicts),
            "fresh": [list(f) for f in self._fresh],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on as if never stopped.

        Raises:
            CheckpointError: the state is not one of a graduation monitor.
        """
        absent = sorted({"history", "novelties", "verdicts", "fresh"} - state.keys())
        if absent:
            raise CheckpointError(f"a graduation monitor's state needs {absent}, it has {sorted(state)}")
        self._history = [Probe.from_json(p) for p in state["history"]]
        self._novelties = list(state["novelties"])
        self._verdicts = list(state["verdicts"])
        self._fresh = [list(f) for f in state["fresh"]]
        self._seen.restore({"seen": [h for f in self._fresh for h in f]})


def graduation_rows(report: MonitorReport) -> list[tuple[str, str, str, str]]:
    """(name, title, verdict, why or what is missing) of each criterion, for a text table."""
    rows = []
    for name, c in report.evidence["criteria"].items():
        rows.append((name, c["title"], c["verdict"], c["why"] if not c["missing"] else f"needs {c['missing']}"))
    return rows
