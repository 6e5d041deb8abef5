"""A run from its config to its result: measure, carry out the plan, measure again, write down what came of it."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml

import tutelage
from tutelage.data.collate import collate
from tutelage.data.files import disk_errors
from tutelage.data.quarantine import Quarantine
from tutelage.data.rounds import RoundStore
from tutelage.errors import ConfigError
from tutelage.evals import EvalResult, compare, compare_controls, evaluate
from tutelage.methods import grading
from tutelage.methods.config import RunConfig, dump_config, load_config
from tutelage.methods.costs import run_ledger
from tutelage.methods.handover import export_handover, plan_of, rl_settings
from tutelage.methods.probing import by_hash, probe_tasks
from tutelage.methods.workbench import Confirm, Workbench, with_examples
from tutelage.policies import smollm2
from tutelage.policies.packed_attention import telling_length
from tutelage.policies.policy import check_forward
from tutelage.signals.routing import ANY
from tutelage.train.distributed import Processes
from tutelage.train.loop import Stage, describe, run_plan
from tutelage.train.run_directory import RunDirectory, write_atomically
from tutelage.train.session import Saving, Session
from tutelage.train.stop import Quiet, StoppableProgress, StopRequest
from tutelage.types import (
    Progress,
    SamplingParams,
    Span,
    TargetRow,
    Task,
    Trajectory,
    Verifier,
    content_hash,
)

Result = TypeVar("Result")
CONFIG = "config.yaml"
TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 0.15}
"""Largest difference between training's logits and the model's own: root mean square, in standard deviations."""
_LONG_TARGETS = 8
"""Targets of the long row that is checked."""


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What an evaluation of the run's model needs."""

    tasks: Sequence[Task]
    verifier: Verifier
    params: SamplingParams
    examples: Sequence[Task]
    """Training tasks for the few-shot control."""
    num_left_out: int = 0
    """Held-out questions left to what decides in the run: gate and monitor."""
    num_shared: int = 0
    """Of the tasks, those that gate or monitor decide on too."""

    def facts(self) -> dict[str, Any]:
        """For the result: how many questions, and whether the run was steered by them."""
        out = {"measured": len(self.tasks), "left_out": self.num_left_out, "shared": self.num_shared}
        if not self.num_shared:
            return out
        why = (
            f"{self.num_shared} of the {len(self.tasks)} questions measured on are also those that the gate or the "
            "graduation monitor decided on, so what is reported was partly chosen by them: hold out more questions "
            "(tasks.heldout at least twice the probe's), or set evaluation.leave_out"
        )
        return {**out, "note": why}


class Job:
    """One run.

    Args:
        folder: what relative paths in the config are relative to.
        progress: where long work reports; None shows nothing.
        is_resume: go on in an existing folder instead of making one.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        progress: Progress | None = None,
        is_resume: bool = False,
        processes: Processes | None = None,
        confirm: Confirm | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.folder, self.is_resume = config, folder, is_resume
        self.processes = processes or Processes()
        self.stop = stop or StopRequest()
        self.progress = StoppableProgress(progress or Quiet(), self.stop)
        self.root = Path(config.run_dir)
        self._check_folder()
        self.started = time.perf_counter()
        self.times_s: dict[str, float] = {}
        self.recorded = resolved_of(self.root) if is_resume else {}
        """What was decided when the run was started."""
        is_same_count = self.recorded.get("processes", self.processes.count) == self.processes.count
        if threads := config.system.threads or (self.recorded.get("threads") if is_same_count else None):
            torch.set_num_threads(threads)  # sums are added up in another order by another number of them
        self.run = RunDirectory(self.root, is_writer=self.processes.is_first)
        self.bench = Workbench(
            config,
            folder,
            quarantine=Quarantine(self.root / "quarantine.jsonl") if self.processes.is_first else None,
            processes=self.processes,
            confirm=confirm,
        )

    def _check_folder(self) -> None:
        if (self.root / CONFIG).exists() and not self.is_resume:
            raise ConfigError(
                f"run_dir {str(self.root)!r} already holds a run. Continue it with `tutelage resume {self.root}`, or "
                "set run_dir to another folder."
            )
        if self.is_resume and not (self.root / CONFIG).exists():
            raise ConfigError(f"{str(self.root)!r} is not the folder of a run: it has no {CONFIG}")

    # -- the whole job -------------------------------------------------------------------------

    def __call__(self) -> dict[str, Any]:
        """Do everything that is not done yet, and return what `result.json` holds.

        Raises:
            Interrupted: asked to stop; the state is saved and `resume` goes on.
        """
        try:
            with self.stop.handling_signals():
                return self._do()
        finally:
            self.bench.close()
            self.run.close()

    def _do(self) -> dict[str, Any]:
        stages = self.build_plan()
        self._write_config(stages)
        self._check_model(stages)
        measuring = self._measuring()
        before: EvalResult | None = None
        controls: dict[str, tuple[EvalResult, str]] = {}
        if measuring is not None:
            before = self._evaluation("before", measuring)
            controls = self._controls(measuring, before)
        self._check_teachers(measuring, before)
        session = self._session()
        resumed = session.resume() if self.is_resume else False
        if self.is_resume:
            self._log_resumed(resumed, session.cursor.total_steps)
        self._timed("plan", lambda: run_plan(stages, session))
        self._timed("save", self._save_final)
        if self.processes.is_first:
            self._timed("hand over", lambda: export_handover(self.config, self.root, self.bench))
        self.processes.wait()
        after = self._evaluation("after", measuring) if measuring is not None else None
        return self._result(session, before, after, controls, measuring)

    def _save_final(self) -> None:
        student = self.bench.student
        if self.config.model.lora:
            student.refresh()
        with student.gathered():
            if self.processes.is_first:
                with disk_errors(self.root / "model", kept="The checkpoints are intact."):
                    student.save_final(self.root / "model")

    def build_plan(self) -> list[Stage]:
        """The config's stages as sources and signals."""

        def build() -> list[Stage]:
            return [stage for _, stage in plan_of(self.config, self.bench)]

        return self._timed("build", build)

    def _timed(self, name: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.times_s[name] = self.times_s.get(name, 0.0) + time.perf_counter() - started

    def _write_config(self, stages: Sequence[Stage]) -> None:
        if self.is_resume or not self.processes.is_first:
            return
        facts = {**self._facts(), "config_folder": str(self.folder), "plan": describe(stages)}
        write_atomically(self.root / CONFIG, dump_config(self.config, facts))

    def _facts(self) -> dict[str, Any]:
        """What the bits of a run depend on besides its settings."""
        import transformers

        return {
            "tutelage": tutelage.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "precision": self.bench.precision,
            "device": self.bench.device,
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "sharding": "full" if self.bench.student.is_sharded else "none",
        }

    def _log_resumed(self, from_checkpoint: bool, step: int) -> None:
        """With what is other than when the run was started: the rest may then differ in the last bits, or in more."""
        changed = {
            name: f"{self.recorded[name]} -> {value}"
            for name, value in self._facts().items()
            if name in self.recorded and self.recorded[name] != value
        }
        self.run.log_event("resumed", {"from_checkpoint": from_checkpoint, "step": step, "changed": changed})

    def _session(self) -> Session:
        saving = self.config.saving
        session = Session(
            run=self.run,
            trainer=self.bench.trainer,
            weights=self.bench.weights(),
            text=self.bench.text,
            seed=self.config.seed,
            saving=Saving(every_steps=saving.every_steps, every_s=60 * saving.every_minutes, keep=saving.keep),
            progress=self.progress.inner,
            stop=self.stop,
            max_logprob_gap=self.config.max_logprob_gap,
            ledger=run_ledger(self.bench),
        )
        self.bench.steps_done = lambda: session.cursor.total_steps
        return session

    def _check_model(self, stages: Sequence[Stage]) -> None:
        """Training's logits are the model's own, packed or padded, before anything is trained."""
        rows = [_probe_row(self.bench.text, i) for i in range(3)]
        dtype = self.bench.trainer.float_dtype
        batches = {"plain": collate(rows, layout="padded", dtype=dtype).to(self.bench.device)}
        if any(s.trainer.layout == "packed" for s in stages):
            batches["packed"] = collate(rows, layout="packed", dtype=dtype).to(self.bench.device)
        policy, tolerance = self.bench.policy, TOLERANCE[self.bench.precision]
        gap = check_forward(policy, batches, tolerance=tolerance)
        fields = {"rms_difference_in_std": gap, "layouts": sorted(batches), "longest_tokens": _longest(rows)}
        length = telling_length(policy.causal_model.config)
        if "packed" in batches and length is not None:  # attended to as short ones are not
            long = [_long_probe_row(self.bench.text, length)]
            batches = {
                "plain": collate(long, layout="padded", dtype=dtype).to(self.bench.device),
                "packed": collate(long, layout="packed", dtype=dtype).to(self.bench.device),
            }
            of_long = check_forward(policy, batches, tolerance=tolerance, layouts=["packed"])
            fields["rms_difference_in_std"] = max(gap, of_long)
            fields["longest_tokens"] = _longest(long)
        self.run.log_event("check_forward", fields)
        if dropout := self.bench.policy.dropout:
            self.bench.notes.append(
                f"dropout of up to {dropout:g} in training: its masks are the same on resume and for any number of "
                "processes, and others for another train.max_tokens or train.layout"
            )
        for note in self.bench.notes:
            self.run.log_event("note", {"note": note})

    # -- measuring -----------------------------------------------------------------------------

    def _measuring(self) -> Measuring | None:
        if self.config.evaluation is None:
            return None
        measuring = measuring_of(self.config, self.bench)
        if measuring is None:
            why = "no stage has tasks and a verifier, or tasks.heldout is 0: there is no question to measure on"
            self.run.log_event("note", {"note": f"no evaluation: {why}"})
        elif measuring.num_shared:
            self.run.log_event("note", {"note": measuring.facts()["note"]})
        return measuring

    def _evaluation(
        self,
        name: str,
        measuring: Measuring,
        *,
        tasks: Sequence[Task] | None = None,
        n: int | None = None,
        temperature: float | None = None,
        greedy: bool = True,
    ) -> EvalResult:
        """One evaluation, kept in the run's folder: a resumed run reads it back."""
        path = self.root / "evaluation" / f"{name}.json"
        if path.exists():
            return EvalResult.from_json(json.loads(path.read_text()))
        settings = self.config.evaluation
        assert settings is not None
        count = n or settings.n
        params = measuring.params if temperature is None else replace(measuring.params, temperature=temperature)
        tasks = tasks or measuring.tasks
        self.bench.rollouts.sync(name)
        sampler = self.bench.sampler("student", name)
        started = time.perf_counter()
        result = evaluate(
            sampler,
            tasks,
            measuring.verifier,
            text=self.bench.text,
            n=count,
            params=params,
            seed=settings.seed,
            ks=tuple(k for k in settings.ks if k <= count),
            greedy=greedy,
            progress=self.progress,
        )
        self.bench.policy.use_plain_attention()
        self.times_s[f"evaluate/{name}"] = time.perf_counter() - started
        if self.processes.is_first:
            path.parent.mkdir(exist_ok=True)
            RoundStore.publish(path.parent / "trajectories", name, [*result.trajectories, *result.greedy_trajectories])
            write_atomically(path, json.dumps(result.to_json()))
        self.processes.wait()
        return result

    def _controls(self, measuring: Measuring, before: EvalResult) -> dict[str, tuple[EvalResult, str]]:
        """What else could explain a gain: decoding, temperature, and being shown the format."""
        settings = self.config.evaluation
        assert settings is not None
        controls = {"base, greedy": (before, "greedy")}
        if not settings.controls:
            return controls
        n = min(4, settings.n)
        by_temperature = {
            t: self._evaluation(f"base-T{t:g}", measuring, n=n, temperature=t, greedy=False)
            for t in settings.control_temperatures
        }
        if by_temperature:
            best = max(by_temperature, key=lambda t: _pass_at_1(by_temperature[t]))
            controls[f"base, best temperature ({best:g})"] = (by_temperature[best], "pass@1")
        if measuring.examples:
            shown = [with_examples(t, list(measuring.examples)) for t in measuring.tasks]
            few = self._evaluation("base-examples", measuring, tasks=shown, n=n)
            best_metric = "greedy" if (few.greedy.value if few.greedy else 0) > _pass_at_1(few) else "pass@1"
            controls[f"base, {len(measuring.examples)} worked examples ({best_metric})"] = (few, best_metric)
        return controls

    def _check_teachers(self, measuring: Measuring | None, before: EvalResult | None) -> None:
        """Every teacher must be better at its tasks, as it will be used; who is not compared is in the events, and why.

        Raises:
            ConfigError: it is not better; the message has both scores with their intervals.
        """
        for i, settings in enumerate(self.config.stages):
            for name, each in grading.teachers_of(settings):
                suffix = "" if name == ANY else f"-{content_hash(name)[:8]}"
                path = self.root / "evaluation" / f"teacher-check-{i}{suffix}.json"
                if path.exists():
                    continue
                is_measured = measuring is not None and before is not None
                why = grading.unchecked(self.bench, each, is_measured=is_measured)
                tasks: Sequence[Task] = ()
                if why is None and measuring is not None:
                    tasks = grading.tasks_of(settings, name, measuring.tasks)
                if measuring is None or before is None or not tasks:
                    facts = grading.check_name(name, each)
                    why = why or "every held-out question has a teacher of its own"
                    self.run.log_event("teacher_check", {"stage": i, **facts, "skipped": why})
                    continue
                report = grading.check_one(
                    self.bench,
                    each,
                    measuring,
                    before,
                    tasks=tasks,
                    allow_worse=each.allow_worse,
                    progress=self.progress,
                )
                self.run.log_event("teacher_check", {"stage": i, **grading.check_name(name, each), **report.to_json()})
                if self.processes.is_first:
                    write_atomically(path, json.dumps(report.to_json()))

    # -- the result ----------------------------------------------------------------------------

    def _result(
        self,
        session: Session,
        before: EvalResult | None,
        after: EvalResult | None,
        controls: Mapping[str, tuple[EvalResult, str]],
        measuring: Measuring | None,
    ) -> dict[str, Any]:
        provenance = smollm2.PROVENANCE if self.config.model.name.lower() == smollm2.ALIAS else None
        result: dict[str, Any] = {
            "status": "done",
            "run_dir": str(self.root),
            "model": str(self.root / "model"),
            "base": {"name": self.config.model.name, "provenance": provenance},
            "rounds": self._rounds(),
            "counts": {
                "steps": session.cursor.total_steps,
                "tokens_sampled": session.num_tokens["sampled"],
                "tokens_trained": session.num_tokens["trained"],
                "quarantined": self.bench.quarantine.count if self.bench.quarantine else 0,
            },
            "ledger": None if session.ledger is None else session.ledger.summary(),
            "times_s": {},
        }
        if before is not None and after is not None:
            result["before"] = before.to_json(tasks=False)
            result["after"] = after.to_json(tasks=False)
            result["gain"] = compare(before, after).to_json()
            result["gains"] = {m: compare(before, after, metric=m).to_json() for m in before.metrics}
            result["controls"] = compare_controls(after, controls)
        if measuring is not None:
            result["questions"] = measuring.facts()
        times = {**{f"plan/{k}": v for k, v in session.times_s.items()}, **self.times_s}
        result["times_s"] = {k: round(v, 3) for k, v in times.items()} | {
            "total": round(time.perf_counter() - self.started, 3)
        }
        self.run.write_json("result.json", result)
        return result

    def _rounds(self) -> list[dict[str, Any]]:
        """What each round drew and kept, from the event log."""
        path = self.root / "events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [
            {k: v for k, v in e.items() if k not in ("event", "time_unix_s")} for e in events if e["event"] == "draw"
        ]


def _pass_at_1(result: EvalResult) -> float:
    estimate = result.pass_at(1).estimate
    return estimate.value if estimate is not None else 0.0


def measuring_of(config: RunConfig, bench: Workbench) -> Measuring | None:
    """What a config's evaluation is made on: its own tasks and verifier, else those of the last stage that has any.
    None where there is no question to measure on. The questions that gates and monitors decide on are left out as
    `evaluation.leave_out` says.

    Raises:
        ConfigError: that leaves no question.
    """
    evaluation = config.evaluation
    assert evaluation is not None
    tasks_of, verifier_of = evaluation.tasks, evaluation.verifier
    for stage in reversed(config.stages):
        tasks_of = tasks_of or getattr(stage, "tasks", None)
        verifier_of = verifier_of or getattr(stage, "verifier", None)
    heldout = bench.heldout_tasks(tasks_of) if tasks_of is not None else []
    if tasks_of is None or verifier_of is None or not heldout:
        return None
    rollout = next((r for s in reversed(config.stages) if (r := getattr(s, "rollout", None))), None)
    params = SamplingParams(
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_new_tokens=evaluation.max_new_tokens or (rollout.max_new_tokens if rollout else 512),
        stop=rollout.stop if rollout else (),
    )
    is_cut = bool(tasks_of.heldout or tasks_of.heldout_path)
    examples = bench.train_tasks(tasks_of)[: evaluation.examples] if is_cut else []
    decided = {t.hash for probe in _probes(config, bench) for t in probe}
    left_out = _left_out(heldout, decided, evaluation.leave_out)
    tasks = [t for t in heldout if t.hash not in left_out]
    return Measuring(
        tasks=tasks,
        verifier=bench.verifier(verifier_of),
        params=params,
        examples=examples,
        num_left_out=len(heldout) - len(tasks),
        num_shared=sum(t.hash in decided for t in tasks),
    )


def _left_out(heldout: Sequence[Task], decided: set[str], asked: int | None) -> set[str]:
    """Hashes of the held-out questions that are not measured on."""
    if asked is None:
        found = {t.hash for t in heldout} & decided
        return found if len(heldout) >= 2 * len(found) else set()
    if asked >= len(heldout):
        raise ConfigError(f"evaluation.leave_out={asked} leaves none of the {len(heldout)} held-out questions")
    return {t.hash for t in by_hash(heldout)[:asked]}


def _probes(config: RunConfig, bench: Workbench) -> list[list[Task]]:
    """The probe sets of all stages, RL after graduation included."""
    following = [rl_settings(s) for s in config.stages if getattr(s, "then", None) == "rl"]
    return [probe_tasks(bench, s) for s in (*config.stages, *following)]


def resolved_of(run_dir: Path) -> dict[str, Any]:
    """What was decided when the run was started: versions, threads, precision, processes."""
    return dict(yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8")).get("resolved") or {})


def config_of(run_dir: Path) -> tuple[RunConfig, Path]:
    """The resolved settings of a run, with `run_dir` where it is now.

    Raises:
        ConfigError: the folder holds no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{str(run_dir)!r} is not the folder of a run: it has no config.yaml")
    body = yaml.safe_load(path.read_text(encoding="utf-8"))
    resolved = body.pop("resolved", {})
    body["run_dir"] = str(run_dir)
    config, _ = load_config(body)
    return config, Path(resolved.get("config_folder", "."))


def _longest(rows: Sequence[TargetRow]) -> int:
    return max(r.trajectory.num_tokens for r in rows)


def _long_probe_row(text: Any, length: int) -> TargetRow:
    """A row of so many tokens of which the last few are targets: the output layer sees no more."""
    ids: list[int] = []
    num_words = length
    while len(ids) < length:
        row = _probe_row(text, num_words // 5)
        ids, num_words = list(row.trajectory.token_ids), 2 * num_words
    prompt, answer = tuple(ids[: length - _LONG_TARGETS]), tuple(ids[length - _LONG_TARGETS : length])
    spans = (
        Span(token_ids=prompt, role="user", author="user"),
        Span(token_ids=answer, role="assistant", author="human", is_sampled=True, is_trainable=True),
    )
    trajectory = Trajectory(id="long probe", task_id="probe", task_hash="", spans=spans)
    count = trajectory.num_targets
    return TargetRow(trajectory=trajectory, columns={"weight_C": np.ones(count)}, count=float(count))


def _probe_row(text: Any, index: int) -> TargetRow:
    words = " ".join(f"word{index * 7 + j}" for j in range(3 + 5 * index))
    messages = [{"role": "user", "content": f"Say {words}."}, {"role": "assistant", "content": f"{words} {index}"}]
    trajectory = Trajectory(
        id=f"probe{index}", task_id="probe", task_hash="", spans=tuple(text.render_conversation(messages)[0])
    )
    count = trajectory.num_targets
    return TargetRow(trajectory=trajectory, columns={"weight_C": np.ones(count)}, count=float(count))
