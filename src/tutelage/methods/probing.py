"""What a run adds to its probes: KL to a reference, held-out demonstrations, other abilities, saved weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.data.rounds import RoundStore
from tutelage.errors import ConfigError
from tutelage.monitors import GraduationSettings
from tutelage.monitors.probe import run_probe
from tutelage.numerics.statistics import Estimate, paired_gain
from tutelage.policies.load import load_model
from tutelage.policies.policy import Policy, add_lora
from tutelage.policies.sampler import InProcessSampler
from tutelage.policies.teachers import InProcessTeacher
from tutelage.train import probed
from tutelage.train.run_directory import write_atomically
from tutelage.types import DrawContext, Sampler, Task, Trajectory

if TYPE_CHECKING:
    from tutelage.methods.settings import RetentionSettings
    from tutelage.methods.workbench import Workbench


class Reference:
    """The weights that drift is measured from, loaded when they are first needed: the model the run began with, or a
    finished stage of the run. Scores tokens and answers probes; held in memory beside the policy.

    Args:
        name: "base" or "stage:NAME".
    """

    def __init__(self, bench: "Workbench", name: str) -> None:
        if name != "base" and not name.startswith("stage:"):
            raise ConfigError(f'probe.reference must be "base" or "stage:NAME", got {name!r}')
        self.bench, self.name = bench, name
        self._scorer: InProcessTeacher | None = None
        self._sampler: InProcessSampler | None = None

    @property
    def is_untrained(self) -> bool:
        """True while the policy still is the reference: nothing has to be sampled twice."""
        return self.name == "base" and self.bench.steps_done() == 0

    @property
    def scorer(self) -> InProcessTeacher:
        if self._scorer is None:
            if self.name == "base":
                self._scorer = self.bench.base_scorer()
            else:
                self._scorer = InProcessTeacher(self._stage_policy(), name=self.name, processes=self.bench.processes)
        return self._scorer

    def _stage_policy(self) -> Policy:
        bench, lora = self.bench, self.bench.config.model.lora
        folder = Path(bench.config.run_dir) / "stages" / self.name.removeprefix("stage:")
        if not folder.is_dir():
            raise ConfigError(f"probe.reference={self.name}: no stage of that name has finished in this run")
        model = load_model(bench.model_path, dtype=bench.precision, device=bench.device)
        if lora:
            model = add_lora(model, **lora.model_dump(), seed=bench.config.seed)
        weights = bench.load_weights(folder)
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])
        return Policy(model)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Sequence[float]]:
        """Nats per target under the reference."""
        return self.scorer.score(trajectories)

    def sampler(self, max_batch: int) -> Sampler:
        if self._sampler is None:
            text = self.bench.text
            self._sampler = InProcessSampler(
                self.scorer.policy.model,
                stop_ids=text.stop_ids,
                decode=text.completion_text,
                author="reference",
                version=self.name,
                max_batch=max_batch,
            )
        return self._sampler


class PolicyScorer:
    """Scores under the policy as it is now, by the trainer."""

    def __init__(self, bench: "Workbench") -> None:
        self.bench = bench

    def score(self, trajectories: Sequence[Trajectory]) -> list[Sequence[float]]:
        return self.bench.trainer.score(trajectories)


class ProbeInputs:
    """The reference's own samples and the further fields of each probe. What the reference said is kept under
    RUN/probes, so that a resumed run compares with the same.

    Args:
        tasks: the probe set.
        settings: a stage's settings with `probe`, `rollout`, `verifier` and `name`.
    """

    def __init__(self, bench: "Workbench", settings: Any, tasks: Sequence[Task]) -> None:
        self.bench, self.settings, self.tasks = bench, settings, tasks
        self.reference = Reference(bench, settings.probe.reference)
        self.root = Path(bench.config.run_dir) / "probes"
        self._samples: Sequence[Trajectory] = ()

    def reference_samples(self, ctx: DrawContext, now: Sequence[Trajectory]) -> Sequence[Trajectory]:
        """`probe.kl_n` samples a question by the reference; `now` are the policy's, which may be the same."""
        if self._samples:
            return self._samples
        folder = self.root / f"reference-{self.settings.name}"
        store = RoundStore(folder) if self.bench.processes.is_first else None
        if store is not None and store.load(0) is None:
            n = self.settings.probe.kl_n
            if self.reference.is_untrained:
                found = [t for t in now if t.sample_index < n]
            else:
                found = self._probe(self.reference.sampler(self.settings.rollout.max_batch), self.tasks, ctx, n)[1]
            store.commit(0, [replace(t, prompt_index=i) for i, t in enumerate(found)])
        self.bench.processes.wait()
        self._samples = RoundStore(folder).load(0) or ()
        return self._samples

    def fields(self, ctx: DrawContext) -> Mapping[str, Any]:
        """`checkpoint`, `at_temperature_cap`, `retention`, and the tokens sampled for it."""
        out: dict[str, Any] = {"checkpoint": keep_weights(self.bench)}
        cap = self.settings.probe.temperature_cap
        out["at_temperature_cap"] = None if cap is None else self.settings.rollout.temperature >= cap
        if self.settings.probe.retention:
            assert ctx.sampler is not None  # a Prober has sampled with it
            sampler = ctx.sampler("policy")
            now = {r.name: self._rates(sampler, r, ctx) for r in self.settings.probe.retention}
            before = self._reference_rates(now, ctx)
            out["retention"] = {name: _change(before[name], rates) for name, (rates, _) in now.items()}
            out["tokens"] = sum(tokens for _, tokens in now.values())
        return out

    def _reference_rates(
        self, now: Mapping[str, tuple[Mapping[str, float], int]], ctx: DrawContext
    ) -> Mapping[str, Mapping[str, float]]:
        path = self.root / f"retention-{self.settings.name}.json"
        if self.bench.processes.is_first and not path.exists():
            if self.reference.is_untrained:
                found = {name: rates for name, (rates, _) in now.items()}
            else:
                sampler = self.reference.sampler(self.settings.rollout.max_batch)
                found = {r.name: self._rates(sampler, r, ctx)[0] for r in self.settings.probe.retention}
            self.root.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(found))
        self.bench.processes.wait()
        return dict(json.loads(path.read_text()))

    def _rates(self, sampler: Sampler, r: "RetentionSettings", ctx: DrawContext) -> tuple[Mapping[str, float], int]:
        """pass@1 of every question of a retention set, and the tokens sampled."""
        tasks = first_tasks(self.bench, r.tasks, r.questions)
        probe, _ = self._probe(sampler, tasks, ctx, r.n, verifier=r.verifier, max_new_tokens=r.max_new_tokens)
        return {t.task_id: t.c / t.n for t in probe.tasks if t.n}, probe.tokens

    def _probe(
        self,
        sampler: Sampler,
        tasks: Sequence[Task],
        ctx: DrawContext,
        n: int,
        *,
        verifier: Any = None,
        max_new_tokens: int | None = None,
    ) -> Any:
        probe, rollout = self.settings.probe, self.settings.rollout
        return run_probe(
            sampler,
            tasks,
            self.bench.verifier(verifier or self.settings.verifier),
            text=self.bench.text,
            n=n,
            seed=self.bench.config.seed,
            step=self.bench.steps_done(),
            max_new_tokens=max_new_tokens or probe.max_new_tokens or rollout.max_new_tokens,
            stop=rollout.stop,
            progress=ctx.progress,
        )


def heldout_demonstrations(settings: Any, bench: "Workbench") -> list[Trajectory]:
    """The demonstrations of `probe.heldout`.

    Raises:
        ConfigError: a stage of the run trains on the same file.
    """
    asked = settings.probe.heldout
    if asked is None:
        return []
    path = bench.path(asked.path)
    for stage in bench.config.stages:
        for name in ("data", "gold"):
            used = getattr(stage, name, None)
            if used is not None and bench.path(used.path) == path:
                raise ConfigError(
                    f"probe.heldout.path={asked.path!r} is trained on by stage {stage.name!r} ({name}.path): held-out "
                    "demonstrations must be others"
                )
    return [t for g in bench.demonstrations(asked) for t in g.trajectories]


def probe_tasks(bench: "Workbench", settings: Any) -> list[Task]:
    """The fixed questions that a stage's gate and graduation monitor decide on; none where it has neither."""
    is_graduating = getattr(settings, "until", None) == "graduation"
    if not is_graduating and not getattr(settings, "gate", False):
        return []
    least = settings.graduation.min_tasks if is_graduating else 1
    return first_tasks(bench, settings.tasks, max(settings.probe.questions, least))


def first_tasks(bench: "Workbench", settings: Any, count: int) -> list[Task]:
    """The first held-out questions, in an order fixed by their ids; training questions where none are held out."""
    return by_hash(bench.heldout_tasks(settings) or bench.train_tasks(settings))[:count]


def by_hash(tasks: Sequence[Task]) -> list[Task]:
    """In an order that is theirs alone, whatever else there is."""
    return sorted(tasks, key=lambda t: t.hash)


def keep_weights(bench: "Workbench", *, count: int = GraduationSettings().last_checkpoints) -> str:
    """Keep the probed weights under RUN/probes: what a graduation hands over is among the last few of them."""
    root, step = Path(bench.config.run_dir), bench.steps_done()
    with bench.student.gathered():
        if bench.processes.is_first:
            probed.save(root, step, bench.save_weights, count=count)
    bench.processes.wait()
    return probed.name_of(step)


def _change(before: Mapping[str, float], now: Mapping[str, float]) -> Estimate:
    shared = [k for k in before if k in now]
    return paired_gain({k: before[k] for k in shared}, {k: now[k] for k in shared})
