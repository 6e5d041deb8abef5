"""What the loop stands on: where a run is, its weights, its folder, and how to go on after a stop.

After a kill the run goes back to its last checkpoint and does what followed again, to the same bits: draws come back
from their committed chunks, orders and samples from their seeds, logs are cut to where the checkpoint was made.
"""

import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from tutelage.data.files import atomic_file, disk_errors
from tutelage.data.rounds import RoundStore
from tutelage.errors import CheckpointError, DataError, Interrupted, NumericsError, SamplerError
from tutelage.train import checkpoint, probed
from tutelage.train.costs import RunLedger
from tutelage.train.run_directory import RunDirectory
from tutelage.train.stop import Quiet, StoppableProgress, StopRequest
from tutelage.train.trainer import Place, Trainer
from tutelage.types import (
    Draw,
    DrawContext,
    Monitor,
    MonitorReport,
    Progress,
    Sampler,
    StepRecord,
    TargetRow,
    Targets,
    Trajectory,
    content_hash,
)

if TYPE_CHECKING:  # the loop imports this module
    from tutelage.train.loop import Stage


NOTHING_LEFT = "NOTHING_LEFT"
"""Ends a stage: there are right answers, and no more to learn from them."""
EMPTY_ROUNDS = 3
"""Rounds in a row with nothing to train on that end a stage."""


@dataclass
class Cursor:
    """How far a run is."""

    stage: int = 0
    round: int = 0
    step: int = 0
    """Updates done in this round."""
    total_steps: int = 0
    """Updates done in this run."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When and how checkpoints are made."""

    every_steps: int | None = None
    every_s: float = 300.0
    keep: int = 2


class Weights:
    """How a run reads and writes weights: whole models or adapters. Made by `methods`."""

    def __init__(
        self,
        *,
        save: Callable[[Path], None],
        load: Callable[[Path], Mapping[str, Tensor]],
        load_base: Callable[[], Mapping[str, Tensor]],
        sampler: Callable[[str, str], Sampler],
        sync: Callable[[str], None] = lambda version: None,
    ) -> None:
        self.save = save
        """Writes the current weights into a folder. Called by the first process, within `Optimizer.gathered`."""
        self.load = load
        """Reads what `save` wrote: name -> weight."""
        self.load_base = load_base
        """The weights the run began with."""
        self.sampler = sampler
        """`sampler(name, version)`: "student" is the current policy; "base", a folder, or a teacher's name."""
        self.sync = sync
        """`sync(version)` gives "student" the weights as they are now. Called by every process."""


class Session:
    """A run in progress."""

    def __init__(
        self,
        *,
        run: RunDirectory,
        trainer: Trainer,
        weights: Weights,
        text: Any,
        seed: int,
        saving: Saving | None = None,
        progress: Progress | None = None,
        stop: StopRequest | None = None,
        max_logprob_gap: float | None = 0.5,
        ledger: RunLedger | None = None,
    ) -> None:
        self.run, self.trainer, self.weights, self.text, self.seed = run, trainer, weights, text, seed
        self.saving = saving or Saving()
        self.stop = stop or StopRequest()
        self.progress = StoppableProgress(progress or Quiet(), self.stop)
        self.max_logprob_gap = max_logprob_gap
        self.ledger = ledger
        self._updates: tuple[Sequence[TargetRow], Sequence[Sequence[int]]] = ((), ())
        self.cursor = Cursor()
        self.scores: dict[str, float] = {}
        self.num_tokens = {"sampled": 0, "trained": 0}
        self.times_s: dict[str, float] = {"draw": 0.0, "train": 0.0, "watch": 0.0, "save": 0.0}
        self._stage_state: dict[str, Any] = {}
        self._resumed_from: Path | None = None
        self._round_start: Mapping[str, Any] = {}
        self._trained_round = -1
        """The stage's last round with something to train on."""
        self._has_accepted = False
        """Since then something was accepted, and no update came of it."""
        self.ended_by = "ROUNDS"
        """What ended the stage before this one: its rounds, a monitor's verdict, or NOTHING_LEFT."""
        self._verdict: str | None = None
        self._reverts = 0
        self._last_save = (time.monotonic(), 0)

    # -- places --------------------------------------------------------------------------------

    def context(self, stage: "Stage") -> DrawContext:
        return DrawContext(
            seed=self.seed,
            stage=self.cursor.stage,
            round=self.cursor.round,
            sampler=lambda name: self.sampler(stage, name),
            text=self.text,
            store=self.run.work(self.cursor.stage, self.cursor.round),
            kept=self.run.root / "kept" / f"stage{self.cursor.stage}",
            progress=self.progress,
            processes=self.trainer.processes,
            scores=self.scores,
            record=self.run.log_event,
        )

    def place(self, stage: "Stage") -> Place:
        continues = stage.start_from == "previous"
        return Place(
            seed=self.seed,
            stage=self.cursor.stage,
            round=self.cursor.round if continues else 0,
            turn=self.cursor.round,
            num_rounds=stage.rounds if continues else 1,
        )

    def sampler(self, stage: "Stage", name: str) -> Sampler:
        """The sampler a source asks for. "student" is whatever the stage's `draw_from` says; "policy" is always the
        weights as they are now: what monitors probe."""
        if name == "policy":
            return self.weights.sampler("student", self._version)
        if name != "student":
            return self.weights.sampler(name, name)
        if self.cursor.step > 0:
            raise CheckpointError(
                f"round {self.cursor.round} was already being trained on, but its drawn chunks are missing from "
                f"{self.run.work(self.cursor.stage, self.cursor.round)} and changed weights cannot draw them again. "
                "Remove the newest checkpoint to go back to the start of the round."
            )
        if stage.draw_from == "current":
            return self.weights.sampler("student", self._version)
        if stage.draw_from.startswith("stage:"):
            return self.weights.sampler(str(self._stage_folder(stage.draw_from[6:])), stage.draw_from)
        return self.weights.sampler(stage.draw_from, stage.draw_from)

    def _stage_folder(self, name: str) -> Path:
        folder = self.run.root / "stages" / name
        if not folder.is_dir():
            raise CheckpointError(f"no stage {name!r} has finished in this run: {folder} does not exist")
        return folder

    # -- a stage -------------------------------------------------------------------------------

    def enter(self, stage: "Stage") -> None:
        """Begin a stage, or go on with the one the checkpoint was made in."""
        if self._stage_state:
            stage.source.restore(self._stage_state["source"])
            stage.signal.restore(self._stage_state["signal"])
            load_signal = getattr(stage.signal, "load", None)
            if load_signal is not None and self._resumed_from is not None:
                load_signal(self._resumed_from / "signal")
            for monitor, state in zip(stage.monitors, self._stage_state["monitors"], strict=True):
                monitor.restore(state)
            self._stage_state = {}
        elif self.cursor.stage > 0:
            self.trainer.optimizer.reset()
        self._round_start = stage.source.state()  # a monitor's server may fail before anything is drawn
        if self.cursor.round == 0 and self.cursor.step == 0:
            self.run.log_event("stage", {"stage": self.cursor.stage, "name": stage.name, "rounds": stage.rounds})
            for monitor in stage.monitors:
                if (start := getattr(monitor, "start", None)) and (report := self._watched(start, stage)) is not None:
                    self._log_verdict(monitor, report)

    def is_wanted(self, stage: "Stage") -> bool:
        """False for a stage that waits for another ending of the one before it. The run then says what it skips."""
        if stage.after is None or self.ended_by in stage.after:
            return True
        why = f"it follows a stage that ends with {' or '.join(stage.after)}; the one before ended with {self.ended_by}"
        self.run.log_event("stage_skipped", {"stage": self.cursor.stage, "name": stage.name, "why": why})
        return False

    def watch(self, stage: "Stage", draw: Draw) -> list[tuple[Monitor, MonitorReport]]:
        """Every monitor's opinion at the end of a round."""
        found = [(m, self._watched(partial(m.after_round, draw), stage)) for m in stage.monitors]
        return [(m, report) for m, report in found if report is not None]

    def _watched(self, ask: Callable[[DrawContext], Any], stage: "Stage") -> Any:
        started = time.perf_counter()
        try:
            self.weights.sync(self._version)
            report = ask(self.context(stage))
        except SamplerError as error:
            raise self._cut_short(stage, error) from error
        self.trainer.policy.use_plain_attention()
        self.times_s["watch"] += time.perf_counter() - started
        return report

    def _log_verdict(self, monitor: Monitor, report: MonitorReport) -> None:
        place = {"stage": self.cursor.stage, "round": self.cursor.round}
        fields = {**place, "monitor": type(monitor).__name__, "verdict": report.verdict}
        self.run.log_event("verdict", {**fields, "stop": report.should_stop, **report.evidence})
        self.scores |= report.scores

    def draw(self, stage: "Stage") -> Draw:
        """The round's draw: from its committed chunks where there are any."""
        started = time.perf_counter()
        self._round_start = stage.source.state()
        try:
            if self.cursor.step == 0 and stage.draw_from == "current" and getattr(stage.source, "is_sampling", True):
                self.weights.sync(self._version)
            draw = stage.source.draw(self.context(stage))
        except SamplerError as error:
            raise self._cut_short(stage, error) from error
        self.trainer.policy.use_plain_attention()
        if self.cursor.step == 0:
            compared = _Comparable(self._version)
            for t in (t for t in draw if draw.is_fresh(t)):
                self.num_tokens["sampled"] += t.num_sampled
                compared.add(t)
            if self.ledger is not None:
                self.ledger.drawn(draw)
            fields = {"stage": self.cursor.stage, "round": self.cursor.round, "trajectories": len(draw), **draw.stats}
            self.run.log_event("draw", fields)
            self._check_logprob_gap(compared)
        self.times_s["draw"] += time.perf_counter() - started
        # Sampled by other weights than those that are trained: on-policy data perhaps, but no on-policy update.
        is_same = stage.draw_from == "current" and stage.start_from == "previous"
        return replace(draw, is_on_policy=draw.is_on_policy and is_same)

    @property
    def _version(self) -> str:
        """Names the weights: the updates go on being counted where some were taken back, so those say how often."""
        taken_back = f"-revert{self._reverts}" if self._reverts else ""
        return f"stage{self.cursor.stage}-step{self.cursor.total_steps}{taken_back}"

    def _cut_short(self, stage: "Stage", error: SamplerError) -> Exception:
        """What to raise where nobody samples any more: saved, if all processes are here to save."""
        if self.trainer.processes.count > 1 and not error.is_everywhere:
            return error
        self.save(stage, is_mid_round=True)
        self.run.log_event("cut_short", {"round": self.cursor.round, "why": str(error)})
        return Interrupted(f"{error} The state is saved: what was sampled so far is kept, and `resume` goes on.")

    def _check_logprob_gap(self, compared: "_Comparable") -> None:
        """The sampler's log-probabilities against the trainer's own on the same tokens, whatever the stage is."""
        known = compared.picked()
        if not known:
            if compared.reasons:
                fields = {"stage": self.cursor.stage, "round": self.cursor.round, "skipped": compared.reasons}
                self.run.log_event("sampler_gap", fields)
            return
        found = []
        for t, scores in zip(known, self.trainer.score(known), strict=True):
            behaviour = [lp for lp, hit in zip(t.behaviour_logprobs or (), t.is_target, strict=True) if hit]
            found.append(np.abs(np.asarray(scores) - np.asarray(behaviour)))
        all_gaps = np.concatenate(found)
        gap = all_gaps[np.isfinite(all_gaps)]
        outside = 1 - gap.size / all_gaps.size  # a token at the edge of top_p may be just outside the trainer's
        fields = {
            "round": self.cursor.round,
            "mean_abs_logprob_gap_nats": float(gap.mean()),
            "max_abs_logprob_gap_nats": float(gap.max()),
            "frac_ratios_outside_0.9_1.1": float((gap > 0.1).mean()),
            "frac_outside_top_p": outside,
            "num_tokens": int(all_gaps.size),
            "num_trajectories": len(known),
        }
        self.run.log_event("sampler_gap", fields)
        if self.max_logprob_gap is not None and not (gap.mean() <= self.max_logprob_gap and outside <= _MOST_OUTSIDE):
            raise NumericsError(
                f"sampler and trainer must agree on the tokens just sampled: their log-probabilities differ by "
                f"{gap.mean():.3g} nats on average over {gap.size} tokens (allowed {self.max_logprob_gap:g}), and "
                f"{outside:.0%} of the tokens are outside the trainer's top-p (allowed {_MOST_OUTSIDE:.0%}). "
                "The sampler has other weights or another template than the trainer, or its precision is too low."
            )

    def start_from(self, stage: "Stage", draw: Draw) -> None:
        """Weights and optimiser at the start of a round's training. A round with nothing to train on leaves them."""
        if stage.start_from == "previous" or not draw.kept():
            return
        if stage.start_from == "base":
            weights = self.weights.load_base()
        else:
            weights = self.weights.load(self._stage_folder(stage.start_from.removeprefix("stage:")))
        self.trainer.optimizer.set_weights(weights)
        self.trainer.optimizer.reset()

    def prepare(self, stage: "Stage", draw: Draw) -> Targets:
        """The signal's targets. A draw with nothing to train on gives no updates, and says so; after `EMPTY_ROUNDS` of
        them in a row `after_round` ends the stage.

        Raises:
            DataError: so many, or the stage's first, and nothing was accepted; or nothing accepted was ever kept.
        """
        try:
            targets = stage.signal.prepare(draw, score_student=self._score_once(stage))
        except SamplerError as error:  # a teacher behind a server
            raise self._cut_short(stage, error) from error
        if self.cursor.step == 0:
            self.run.log_event("targets", {"round": self.cursor.round, "divisor": targets.divisor, **targets.stats})
        if any(r.is_trained for r in targets.rows):
            self._trained_round, self._has_accepted = self.cursor.round, False
            batches = self.trainer.batches(targets.rows, stage.trainer, self.place(stage))
            total = len(batches)
            self._updates = targets.rows, batches
            if self.ledger is not None and self.cursor.step > 0:
                self.ledger.forget_teacher()
            self.progress.inner.start(f"training, round {self.cursor.round + 1} of {stage.rounds}", total, "updates")
            self.progress.inner.advance(self.cursor.step)
            return targets
        has_trained = self._trained_round >= 0
        self._has_accepted |= any(t.verdict and t.verdict.is_accepted and (t.weight or has_trained) for t in draw)
        verdicts = [t.verdict for t in draw if t.verdict is not None]
        reasons: dict[str, int] = {}
        for v in verdicts:
            reasons[v.reason] = reasons.get(v.reason, 0) + 1
        top = ", ".join(f"{n} x {r!r}" for r, n in sorted(reasons.items(), key=lambda kv: -kv[1])[:3])
        cut = sum(t.is_truncated for t in draw)
        what = (
            f"stage {stage.name!r}, round {self.cursor.round}: nothing to train on. Of {len(draw)} trajectories "
            f"{sum(v.is_accepted for v in verdicts)} were accepted and {len(draw.kept())} kept"
            + (f"; {cut} ran into their length limit (rollout.max_new_tokens)" if cut else "")
            + (f"; verdicts: {top}" if top else "")
        )
        is_hopeless = self.cursor.round == 0 and verdicts and not any(v.is_accepted for v in verdicts)
        if is_hopeless or (self._is_spent and not self._has_accepted):
            raise DataError(
                f"{what}. Sample more per prompt, use easier prompts, check the verifier on a few completions in "
                f"{self.run.trajectories}, or give demonstrations first (SFT)."
            )
        self.run.log_event("empty_round", {"round": self.cursor.round, "why": what})
        return Targets(rows=[], divisor=targets.divisor)

    @property
    def _is_spent(self) -> bool:
        return self.cursor.round - self._trained_round >= EMPTY_ROUNDS

    def _score_once(self, stage: "Stage") -> Callable[[Sequence[Trajectory]], list[Sequence[float]]]:
        """Scores under the weights before the round's first update: kept on disk, since a resumed run has others."""

        def score(trajectories: Sequence[Trajectory]) -> list[Sequence[float]]:
            folder = self.run.work(self.cursor.stage, self.cursor.round)
            asked = content_hash([t.id for t in trajectories], [len(t.spans) for t in trajectories])
            path = folder / f"student_logprobs-{asked}.npz"
            if path.exists():
                with np.load(path) as kept:
                    values, lengths = kept["values"], kept["lengths"]
                return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]
            if self.cursor.step > 0:
                raise CheckpointError(f"{path} is missing: it cannot be made again from changed weights")
            scores = self.trainer.score(trajectories)
            if self.ledger is not None:
                self.ledger.scored(trajectories)
            if self.run.is_writer:
                folder.mkdir(parents=True, exist_ok=True)
                values = np.concatenate([np.asarray(s, dtype=np.float64) for s in scores]) if scores else np.zeros(0)
                with atomic_file(path, kept="The round's drawn chunks are intact.") as file:
                    np.savez(file, values=values, lengths=np.array([len(s) for s in scores], dtype=np.int64))
            self.trainer.processes.wait()
            return scores

        return score

    def after_step(self, stage: "Stage", record: StepRecord) -> list[tuple[Monitor, MonitorReport]]:
        """Log the update, probe where one is due, save if it is time, and stop if asked to.

        Returns:
            The opinions that end the stage here, in the middle of its round. Nothing is saved then: `leave` does.
        """
        self.cursor.step = record.step + 1
        self.cursor.total_steps += 1
        self.num_tokens["trained"] += int(record.metrics.get("data/num_tokens", 0))
        if self.ledger is not None:
            rows, batches = self._updates
            self.ledger.updated([r.trajectory for i in batches[record.step] if (r := rows[i]).is_trained])
        self.times_s["train"] += record.metrics.get("time/step_s", 0.0)
        place = {"stage": record.stage, "round": self.cursor.round, "step": self.cursor.total_steps}
        self.run.log_metrics({**place, **record.metrics})
        self.progress.inner.advance(1, loss=record.metrics.get("train/loss", 0.0))
        for monitor in stage.monitors:
            is_due, probe = getattr(monitor, "due", None), getattr(monitor, "probe_now", None)
            if is_due and probe and is_due(self.cursor.total_steps):
                report = self._watched(probe, stage)
                self._log_verdict(monitor, report)
                if report.should_stop:
                    return [(monitor, report)]
        stopping = self.trainer.processes.any(self.stop.is_set)
        if stopping or self._is_time_to_save():
            self.save(stage)
        if stopping:
            raise Interrupted(
                f"stopped by {self.stop.reason or 'another process'} after step {self.cursor.total_steps}: state saved"
            )
        return []

    def end_within_round(self, draw: Draw, reports: Sequence[tuple[Monitor, MonitorReport]]) -> None:
        """The stage ends at a probe between two updates: keep the draw and hand over."""
        self._keep_draw(draw)
        self.run.log_event("round_cut", {"round": self.cursor.round, "steps_done": self.cursor.step})
        self.cursor.round, self.cursor.step = self.cursor.round + 1, 0
        self._verdict = reports[0][1].verdict
        self._hand_over(reports)

    def _keep_draw(self, draw: Draw) -> None:
        self.progress.inner.finish()
        if self.run.is_writer:
            RoundStore.publish(self.run.trajectories, f"stage{self.cursor.stage}-round{self.cursor.round:05d}", draw)

    def after_round(self, stage: "Stage", draw: Draw, reports: Sequence[tuple[Monitor, MonitorReport]]) -> bool:
        """Keep the draw, act on the monitors, move the cursor. True ends the stage."""
        self._keep_draw(draw)
        for monitor, report in reports:
            self._log_verdict(monitor, report)
        if any(r.should_revert for _, r in reports):
            self._revert(stage)
            start = self.cursor.total_steps - self.cursor.step
            for monitor in stage.monitors:
                if forget := getattr(monitor, "forget_after", None):
                    forget(start)
            if self.run.is_writer:
                probed.drop_after(self.run.root, start)
            reports = [(m, r) for m, r in reports if r.should_revert]  # the others judged weights that are gone
        should_stop = self._is_spent or any(r.should_stop for _, r in reports)
        self.cursor.round, self.cursor.step = self.cursor.round + 1, 0
        if should_stop:
            self._verdict = next((r.verdict for _, r in reports if r.should_stop), NOTHING_LEFT)
            self._hand_over(reports)
            return True  # saved by `leave`, as the next stage's start
        if _may_go_back(stage) or self._is_time_to_save():
            self.save(stage)
        return should_stop

    def _hand_over(self, reports: Sequence[tuple[Monitor, MonitorReport]]) -> None:
        """Weights of the checkpoint that a monitor chose to go on from, where it kept any.

        Raises:
            CheckpointError: they are gone.
        """
        for _, report in reports:
            chosen = (report.evidence.get("hand_over") or {}) if report.should_stop else {}
            if name := chosen.get("checkpoint"):
                self.trainer.optimizer.set_weights(self.weights.load(probed.folder_of(self.run.root, name)))
                self.trainer.optimizer.reset()
                self.run.log_event("hand_over", {"round": self.cursor.round - 1, **chosen})
                return

    def _revert(self, stage: "Stage") -> None:
        """Weights and optimiser as they were when the round began; the cursor and the sources go on."""
        start = f"-{self.cursor.stage:02d}-{self.cursor.round:05d}-00000"
        found = [p for p in checkpoint.checkpoints(self.run.checkpoints) if p.name.endswith(start)]
        if found:
            self._load_weights(found[-1])
        elif self.cursor.stage == 0 and self.cursor.round == 0:
            self.trainer.optimizer.set_weights(self.weights.load_base())
            self.trainer.optimizer.reset()
        else:
            raise CheckpointError(
                f"cannot go back to the start of round {self.cursor.round}: no checkpoint ending in {start} is left in "
                f"{self.run.checkpoints}"
            )
        self._reverts += 1
        place = {"stage": self.cursor.stage, "round": self.cursor.round}
        self.run.log_event("revert", {**place, "to": found[-1].name if found else "base"})

    def skip(self) -> None:
        """Go on to the next stage."""
        self._next_stage()

    def leave(self, stage: "Stage", *, is_last: bool) -> None:
        """End a stage. Unless it is the last, its weights are kept under its name for later stages to start from."""
        if not is_last:
            with self.trainer.optimizer.gathered():
                if self.run.is_writer:
                    folder = self.run.root / "stages" / stage.name
                    with disk_errors(folder, kept="The checkpoints made before it are intact."):
                        self.weights.save(folder)
        self.ended_by, self._verdict = self._verdict or "ROUNDS", None
        fields = {"stage": self.cursor.stage, "name": stage.name, "rounds": self.cursor.round}
        self.run.log_event("stage_end", {**fields, "ended_by": self.ended_by, "step": self.cursor.total_steps})
        self._next_stage()
        self._round_start = {}
        self.save(None)

    def _next_stage(self) -> None:
        self.cursor.stage, self.cursor.round, self.cursor.step = self.cursor.stage + 1, 0, 0
        self._trained_round, self._has_accepted = -1, False

    # -- saving --------------------------------------------------------------------------------

    def _is_time_to_save(self) -> bool:
        at, steps = self._last_save
        due = self.saving.every_steps is not None and self.cursor.total_steps - steps >= self.saving.every_steps
        return self.trainer.processes.any(due or time.monotonic() - at >= self.saving.every_s)

    def save(self, stage: "Stage | None", *, is_mid_round: bool = False) -> None:
        """A checkpoint of everything the run needs to go on from here."""
        started = time.perf_counter()
        self.trainer.processes.wait()
        with self.trainer.optimizer.gathered():
            self._save(stage, is_mid_round=is_mid_round or self.cursor.step > 0)
        self.trainer.processes.wait()
        self._last_save = (time.monotonic(), self.cursor.total_steps)
        self.times_s["save"] += time.perf_counter() - started

    def _save(self, stage: "Stage | None", *, is_mid_round: bool) -> None:
        if self.run.is_writer:
            state: dict[str, Any] = {
                "cursor": asdict(self.cursor),
                "seed": self.seed,
                "scores": self.scores,
                "num_tokens": self.num_tokens,
                "times_s": self.times_s,
                "trained_round": self._trained_round,
                "has_accepted": self._has_accepted,
                "ended_by": self.ended_by,
                "reverts": self._reverts,
                "logs": self.run.log_sizes(),
                "ledger": None if self.ledger is None else self.ledger.state(),
                "stage": {},
            }
            if stage is not None:
                state["stage"] = {
                    "source": self._round_start if is_mid_round else stage.source.state(),
                    "signal": stage.signal.state(),
                    "monitors": [m.state() for m in stage.monitors],
                }
            c = self.cursor
            name = f"step-{c.total_steps:07d}-{c.stage:02d}-{c.round:05d}-{c.step:05d}"
            write = functools.partial(self._write, stage)
            least = 2 if stage is not None and _may_go_back(stage) else 1  # the newest, and the round's start
            checkpoint.save(self.run.checkpoints, name, write, state, keep=max(least, self.saving.keep))
            self._drop_finished_work()

    def _write(self, stage: "Stage | None", folder: Path) -> None:
        self.weights.save(folder / "model")
        self.trainer.optimizer.save(folder / "optimizer.safetensors")
        save_signal = getattr(stage.signal, "save", None) if stage is not None else None
        if save_signal is not None:  # tensors of its own: an averaged teacher
            (folder / "signal").mkdir()
            save_signal(folder / "signal")

    def _drop_finished_work(self) -> None:
        """Drop the chunks of rounds that no kept checkpoint is in: should the newest be damaged, the one before needs
        the chunks of its own round."""
        places = [checkpoint.place_of(p) for p in checkpoint.checkpoints(self.run.checkpoints)]
        kept = {self.run.work(stage, round_).name for stage, round_ in places}
        for path in (self.run.root / "work").glob("stage*-round*"):
            if path.name not in kept:
                shutil.rmtree(path)

    def resume(self) -> bool:
        """Go back to the newest sound checkpoint. False if there is none: the run starts over with its chunks.

        Raises:
            CheckpointError: there are checkpoints and all are damaged, or the newest is of another seed.
        """
        processes = self.trainer.processes
        found, damaged = processes.from_first(self._newest_checkpoint)  # all go on from the same one
        if found is None:
            self.run.cut_logs({})
            return False
        folder, state = self.run.checkpoints / found[0], found[1]
        if state["seed"] != self.seed:
            raise CheckpointError(f"{folder} belongs to a run with seed {state['seed']}, not {self.seed}")
        self.cursor = Cursor(**state["cursor"])
        self.scores, self.num_tokens, self.times_s = state["scores"], state["num_tokens"], state["times_s"]
        self._trained_round, self._has_accepted = state["trained_round"], state["has_accepted"]
        self.ended_by, self._reverts = state.get("ended_by", "ROUNDS"), state["reverts"]
        if self.ledger is not None and state.get("ledger"):
            self.ledger.restore(state["ledger"])
        self._stage_state = state["stage"]
        self._resumed_from = folder
        self._load_weights(folder)
        self.run.cut_logs(state["logs"])
        processes.wait()
        for name, why in damaged if self.run.is_writer else ():
            self._report_damage(name, why)
            shutil.rmtree(self.run.checkpoints / name)
        self._last_save = (time.monotonic(), self.cursor.total_steps)
        return True

    def _newest_checkpoint(self) -> tuple[tuple[str, dict[str, Any]] | None, list[tuple[str, str]]]:
        """Name and state of the newest sound one, and the name and damage of each that was passed over."""
        damaged: list[tuple[str, str]] = []
        found = checkpoint.newest_good(self.run.checkpoints, lambda p, why: damaged.append((p.name, why)))
        return None if found is None else (found[0].name, found[1]), damaged

    def _load_weights(self, folder: Path) -> None:
        self.trainer.optimizer.set_weights(self.weights.load(folder / "model"))
        self.trainer.optimizer.load(folder / "optimizer.safetensors")

    def _report_damage(self, name: str, why: str) -> None:
        self.run.log_event("damaged_checkpoint", {"checkpoint": name, "why": why})


def _may_go_back(stage: "Stage") -> bool:
    """Whether a monitor of the stage may need the start of a round."""
    return any(getattr(m, "saves_rounds", True) for m in stage.monitors)


_MOST_COMPARED = 32
"""Trajectories of a round whose log-probabilities are computed again."""
_MOST_OUTSIDE = 0.1
"""Largest share of sampled tokens that the trainer's top-p may exclude."""


class _Comparable:
    """Of a round's trajectories, an even pick of those that the current weights sampled with known log-probabilities.

    One pass, in the memory of a few trajectories: where twice the number is reached, every other one is dropped, and
    from then on half as many are taken.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        self.reasons: dict[str, int] = {}
        """Why trajectories cannot be compared, and how many."""
        self._taken: list[Trajectory] = []
        self._stride, self._count = 1, 0

    def add(self, trajectory: Trajectory) -> None:
        spans = [s for s in trajectory.spans if s.is_trainable]
        why = None
        if not spans or not trajectory.num_targets:
            why = "nothing in it to train on"
        elif any(s.policy_version != self.version for s in spans):
            why = "not sampled by the weights that are trained, as they are now"
        elif trajectory.behaviour_logprobs is None:
            why = "no log-probabilities as sampled"
        if why is not None:
            self.reasons[why] = self.reasons.get(why, 0) + 1
            return
        if self._count % self._stride == 0:
            self._taken.append(trajectory)
        self._count += 1
        if len(self._taken) == 2 * _MOST_COMPARED:
            self._taken, self._stride = self._taken[::2], 2 * self._stride

    def picked(self) -> list[Trajectory]:
        """At most `_MOST_COMPARED`, evenly over those added."""
        if len(self._taken) <= _MOST_COMPARED:
            return self._taken
        at = np.linspace(0, len(self._taken) - 1, _MOST_COMPARED).round().astype(int)
        return [self._taken[i] for i in at]
