"""From settings to objects: the model, its text, tasks, verifiers, demonstrations and samplers of one run.

Settings stop here: nothing below sees them.
"""

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.data import demos
from tutelage.data import tasks as task_sets
from tutelage.data.quarantine import Quarantine
from tutelage.errors import ConfigError, DataError, TemplateError
from tutelage.methods.config import RunConfig
from tutelage.methods.grading import MIXED, make_teacher, mixed_sampler, teachers_of
from tutelage.methods.rollouts import Rollouts, rollout_of
from tutelage.methods.servers import addresses, servers_of
from tutelage.methods.settings import (
    DataSettings,
    RolloutSettings,
    TaskSettings,
    TrainSettings,
    VerifierSettings,
)
from tutelage.methods.stored import is_store, stored_groups
from tutelage.methods.student import Student
from tutelage.methods.teacher_settings import TeacherSettings
from tutelage.policies.load import load_model, load_tokenizer
from tutelage.policies.policy import Policy
from tutelage.policies.teachers import InProcessTeacher
from tutelage.text import ChatText
from tutelage.train.distributed import Processes
from tutelage.train.session import Weights
from tutelage.train.trainer import Trainer, TrainerSettings
from tutelage.types import Group, Sampler, SamplingParams, Task, Trajectory, Verifier, content_hash
from tutelage.verifiers import build_verifier

Confirm = Callable[[str], bool]


class Workbench:
    """Builds a run's parts from its settings, each once.

    Args:
        folder: what relative paths in the settings are relative to.
        quarantine: where unreadable records go; None keeps none (a dry run).
        confirm: asked before code outside the project is run; None says no.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        quarantine: Quarantine | None = None,
        processes: Processes | None = None,
        confirm: Confirm | None = None,
    ) -> None:
        self.config, self.folder, self.quarantine = config, folder, quarantine
        self.processes = processes or Processes()
        self.confirm = confirm
        self.notes: list[str] = []
        """What was decided or changed on the way, for the person who runs it."""
        self.steps_done: Callable[[], int] = lambda: 0
        """Updates so far; the run sets it once it has begun."""
        self._task_sets: dict[str, tuple[list[Task], list[Task]]] = {}
        self._verifiers: dict[str, Verifier] = {}
        self._teachers: dict[str, Any] = {}
        self._teacher_policies: dict[tuple[str, str, str | None], Policy] = {}

    # -- the model -----------------------------------------------------------------------------

    @cached_property
    def device(self) -> str:
        """cpu, cuda:N or mps, as asked or as found."""
        asked = self.config.system.device
        if asked != "auto":
            return asked
        if torch.cuda.is_available():
            return f"cuda:{self.processes.local_index}"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    @cached_property
    def precision(self) -> str:
        """Of the weights in forward and backward."""
        asked = self.config.model.precision
        if asked != "auto":
            return asked
        return "bfloat16" if has_fast_bfloat16(self.device) else "float32"

    @cached_property
    def model_path(self) -> str:
        """The student's name, as a path where there is such a folder beside the config."""
        beside = self.folder / self.config.model.name
        return str(beside) if beside.is_dir() else self.config.model.name

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.model_path)
        return tokenizer

    @cached_property
    def text(self) -> ChatText:
        """The student's tokenizer with its chat template."""
        from transformers import GenerationConfig

        from tutelage.policies.load import resolve_model

        try:
            generation = GenerationConfig.from_pretrained(resolve_model(self.model_path)[0])
        except OSError:
            generation = None
        chat = ChatText(self.tokenizer, template_kwargs=self.config.model.template_kwargs, generation_config=generation)
        problem = chat.check_eos_pad()
        if problem is not None:
            self.notes.append(str(problem))
        return chat

    @cached_property
    def student(self) -> Student:
        """The model that is trained."""
        return Student(
            self.config,
            self.model_path,
            tokenizer=self.tokenizer,
            precision=self.precision,
            device=self.device,
            processes=self.processes,
        )

    @property
    def policy(self) -> Policy:
        return self.student.policy

    @property
    def trainer(self) -> Trainer:
        return self.student.trainer

    def trainer_settings(self, train: TrainSettings, *, lr: float, lora_factor: float) -> TrainerSettings:
        """The method's default learning rate is for all weights; adapters take `lora_factor` times it."""
        default = lr * (lora_factor if self.config.model.lora else 1.0)
        layout = train.layout
        if layout == "packed" and not self.policy.supports_packing:
            layout = "padded"
            self.notes.append(
                f"{type(self.policy.causal_model).__name__} carries state along a row, so documents cannot share one: "
                "train.layout is padded"
            )
        return TrainerSettings(
            lr=train.lr if train.lr is not None else default,
            batch_size=train.batch_size,
            epochs=train.epochs,
            updates=train.updates,
            updates_growth=train.updates_growth,
            schedule=train.schedule,
            warmup=train.warmup,
            max_grad_norm=train.max_grad_norm,
            max_tokens=train.max_tokens,
            layout=layout,
        )

    # -- weights -------------------------------------------------------------------------------

    def weights(self) -> Weights:
        """How the run reads and writes its weights, and who samples with them."""
        return Weights(
            save=self.save_weights,
            load=self.load_weights,
            load_base=self.load_base,
            sampler=self.sampler,
            sync=self.rollouts.sync,
        )

    def save_weights(self, folder: Path) -> None:
        """The trained weights in full precision: a whole model, or the adapter. Within `student.gathered`."""
        self.student.save_weights(folder)

    def load_weights(self, folder: Path) -> Mapping[str, Tensor]:
        """Name -> weight of what `save_weights` wrote."""
        return self.student.load_weights(folder)

    def load_base(self) -> Mapping[str, Tensor]:
        """The weights the run began with."""
        return self.student.load_base()

    # -- samplers ------------------------------------------------------------------------------

    @cached_property
    def rollouts(self) -> Rollouts:
        """Who samples."""
        return Rollouts(
            self.student,
            rollout_of(self.config),
            text=self.text,
            load_base=lambda: load_model(self.model_path, dtype=self.precision, device=self.device),
            other=self._other_sampler,
            weights_dir=Path(self.config.run_dir).absolute() / "serving",
        )

    def sampler(self, name: str, version: str) -> Sampler:
        """ "student" is the policy as of the last `rollouts.sync`; "base" the model the run began with; else a teacher
        (`author_of`), or a model's path or name."""
        sampler = self.rollouts.sampler(name, version)
        if name == MIXED:
            self.student.plain.use_plain_attention()
            sampler.version = f"step{self.steps_done()}"
        return sampler

    def _other_sampler(self, name: str) -> Sampler:
        """A teacher, where its settings say it is, or any model by path or name."""
        if name == MIXED:
            return mixed_sampler(self)
        teacher = next((t for t in self._all_teachers() if self.author_of(t) == name), None)
        if teacher is None:
            return self.rollouts.in_process(self.teacher_policy(name).model, name)
        if teacher.url is not None:
            return self.rollouts.served(servers_of(addresses(teacher.url), teacher.server), name)
        policy = self.teacher_policy(teacher.name, teacher.precision, teacher.quantise)
        return self.rollouts.in_process(policy.model, name)

    def author_of(self, teacher: TeacherSettings) -> str:
        """Who answers for a teacher, as `sampler` takes it: its name, with how it runs where the run has several ways;
        "student" for a teacher that is the student."""
        if teacher.name == "self" or teacher.is_own_average:
            return "student"
        ways = {_way(t) for t in self._all_teachers() if t.name == teacher.name}
        how = ", ".join(_way(teacher)) if len(ways) > 1 else ""
        return f"{teacher.name} ({how})" if how else teacher.name

    def _all_teachers(self) -> list[TeacherSettings]:
        return [t for stage in self.config.stages for _, t in teachers_of(stage)]

    def base_scorer(self) -> InProcessTeacher:
        """The model the run began with, as a scorer of tokens."""
        if "base" not in self._teachers:
            model = load_model(self.model_path, dtype=self.precision, device=self.device)
            self._teachers["base"] = InProcessTeacher(model, name="base", processes=self.processes)
        scorer: InProcessTeacher = self._teachers["base"]
        return scorer

    def sampling(self, rollout: RolloutSettings) -> SamplingParams:
        return SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_new_tokens=rollout.max_new_tokens,
            stop=rollout.stop,
        )

    # -- teachers ------------------------------------------------------------------------------

    def teacher(self, settings: TeacherSettings) -> Any:
        """The teacher as the signals use it, made once: `grading.make_teacher`."""
        key = settings.model_dump_json(exclude={"by_task"})
        if key not in self._teachers:
            self._teachers[key] = make_teacher(self, settings)
        return self._teachers[key]

    def teacher_policy(self, name: str, precision: str = "auto", quantise: str | None = None) -> Policy:
        """The teacher's model, loaded once: it samples and grades with the same weights."""
        dtype = self.precision if precision == "auto" else precision
        key = (self.beside(name), dtype, quantise)
        if key not in self._teacher_policies:
            self._teacher_policies[key] = Policy(load_model(key[0], dtype=dtype, device=self.device, quantise=quantise))
        return self._teacher_policies[key]

    def release_teacher(self, settings: TeacherSettings) -> None:
        """Let go of the model of a teacher that only its cache is needed of."""
        live = settings.model_copy(update={"cache": None})
        self._teachers.pop(live.model_dump_json(exclude={"by_task"}), None)
        dtype = self.precision if settings.precision == "auto" else settings.precision
        self._teacher_policies.pop((self.beside(settings.name), dtype, settings.quantise), None)
        self.rollouts.forget(self.author_of(settings))

    def beside(self, name: str) -> str:
        """A model's name, as a path where there is such a folder beside the config (a run's folder: its model)."""
        for folder in (self.folder / name, Path(name)):
            if (folder / "model" / "config.json").exists():
                return str(folder / "model")
            if folder.is_dir():
                return str(folder)
        return name

    # -- data ----------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """A path in the settings: relative to the config's folder, else to the current one. `$NAME` is expanded.

        Raises:
            ConfigError: there is no such file; the nearest existing name is given.
        """
        given = Path(os.path.expandvars(name)).expanduser()
        for candidate in [given] if given.is_absolute() else [self.folder / given, given]:
            if candidate.exists():
                return candidate
        parent = (self.folder / given).parent
        names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        near = difflib.get_close_matches(given.name, names, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        unset = "; an environment variable in it is not set" if "$" in str(given) else ""
        raise ConfigError(f"path {name!r}: no such file, neither in {self.folder} nor in {Path.cwd()}{hint}{unset}")

    def train_tasks(self, settings: TaskSettings) -> list[Task]:
        return self._tasks(settings)[0]

    def heldout_tasks(self, settings: TaskSettings) -> list[Task]:
        """Questions kept out of training, none of them equal to a training question."""
        return self._tasks(settings)[1]

    def _tasks(self, settings: TaskSettings) -> tuple[list[Task], list[Task]]:
        key = settings.model_dump_json()
        if key not in self._task_sets:
            train, heldout = self._load_tasks(settings)
            if not train:
                raise DataError(f"tasks {settings.path or settings.name}: no usable question; see the quarantine file")
            self._task_sets[key] = (train, heldout)
        return self._task_sets[key]

    def _load_tasks(self, s: TaskSettings) -> tuple[list[Task], list[Task]]:
        system = self.config.model.system_prompt
        shape: dict[str, Any] = {"system": system, **({"prompt": s.prompt} if s.prompt else {})}
        if s.kind == "reasoning_gym":
            assert s.name is not None
            common = {"config": s.options, "seed": self.config.seed, "heldout": s.heldout, **shape}
            if s.canonical:
                common["canonical"] = s.canonical
            drawn = self._kept(task_sets.reasoning_gym_tasks(s.name, s.size, split="train", **common))
            if not s.heldout:
                return drawn, []
            return drawn, self._kept(task_sets.reasoning_gym_tasks(s.name, None, split="heldout", **common))
        assert s.path is not None
        path = self.path(s.path)
        if s.kind == "jsonl":
            shape |= {"question": s.prompt_field, "answer": s.answer_field}
        read: Callable[..., task_sets.Loaded] = {
            "gsm8k": task_sets.gsm8k,
            "math500": task_sets.math500,
            "jsonl": task_sets.jsonl,
        }[s.kind]
        train = self._kept(read(path, **shape))
        if s.heldout_path:
            more = {"split": "test"} if s.kind == "gsm8k" else {}
            held = self._kept(read(self.path(s.heldout_path), **shape, **more))
            held = _sampled(held, s.heldout, self.config.seed) if s.heldout else held
        else:
            held = _sampled(train, s.heldout, self.config.seed)
            names = {t.id for t in held}
            train = [t for t in train if t.id not in names]
        train = self._kept(task_sets.without_overlap(train, held))
        return (_sampled(train, s.size, self.config.seed) if s.size else train), held

    def _kept(self, loaded: Any) -> list[Task]:
        for problem in loaded.problems:
            self._quarantine(problem.origin, problem.reason)
        return list(loaded.tasks)

    def _quarantine(self, origin: str, reason: str, raw: str = "") -> None:
        if self.quarantine is not None:
            file, _, line = origin.rpartition(":")
            number = int(line) if line.isdigit() else None
            self.quarantine.add(file=file if number is not None else origin, line=number, reason=reason, raw=raw)

    def verifier(self, settings: VerifierSettings) -> Verifier:
        """Raises ConfigError where its code lies outside the project and nobody allowed it."""
        key = settings.model_dump_json()
        if key not in self._verifiers:
            kind, options = self.verifier_options(settings)
            self._verifiers[key] = build_verifier(kind, options, root=self.folder)
        return self._verifiers[key]

    def verifier_options(self, settings: VerifierSettings) -> tuple[str, dict[str, Any]]:
        """What `build_verifier` is called with."""
        options: dict[str, Any] = dict(settings.options)
        for name in ("function", "pattern", "extract"):
            if (value := getattr(settings, name)) is not None:
                options[name] = value
        options["limits"] = {"time_s": settings.time_limit_s, "memory_bytes": settings.memory_limit_mb << 20}
        options["reject_truncated"] = not settings.accept_truncated
        if settings.workers:
            options["workers"] = settings.workers
        if settings.kind == "python":
            options["allow_outside_code"] = settings.allow_code_outside or self._is_allowed(settings)
        return settings.kind, options

    def _is_allowed(self, settings: VerifierSettings) -> bool:
        """Ask the person at the terminal, if there is one, before code outside the project is run."""
        if self.confirm is None:
            return False
        try:
            build_verifier("python", {"function": settings.function or ""}, root=self.folder)
        except ConfigError as error:
            return self.confirm(str(error))
        return True

    def demonstrations(self, settings: DataSettings) -> list[Group]:
        """Recorded conversations as trajectories by prompt. What cannot be used is quarantined and counted.

        Raises:
            DataError: nothing is left, or a conversation is too long and `overlong` is "error".
        """
        path = self.path(settings.path)
        if is_store(path):
            found, notes = stored_groups(path, settings, self.text, self._quarantine)
            self.notes += [n for n in notes if n not in self.notes]
            return found
        loaded = demos.load(path, format=settings.format, on_bad_record=settings.on_bad_record, limit=settings.limit)
        for bad in loaded.problems:
            self._quarantine(bad.origin, bad.reason, bad.raw)
        groups: list[Group] = []
        for demo in loaded.demos:
            if group := self._demonstration(demo, settings, len(groups)):
                groups.append(group)
        if not groups:
            raise DataError(
                f"{path}: none of {len(loaded.demos)} readable records can be trained on; see the quarantine"
            )
        return groups

    def _demonstration(self, demo: Any, settings: DataSettings, index: int) -> Group | None:
        messages = list(demo.messages)
        if self.config.model.system_prompt and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self.config.model.system_prompt})
        try:
            samples = self.text.render_conversation(
                messages,
                train=settings.train_on,
                tools=demo.tools,
                max_tokens=settings.max_length,
                overlong=settings.overlong,
            )
        except TemplateError as error:
            if settings.on_bad_record == "error" or "at most" in str(error):
                raise DataError(f"{demo.origin}: {error}") from error
            self._quarantine(demo.origin, str(error))
            return None
        if not samples:
            self._quarantine(demo.origin, f"longer than data.max_length={settings.max_length} tokens: dropped")
            return None
        last_user = max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=0)
        task = Task(id=demo.origin, messages=tuple(messages[: last_user + 1]), name="demonstrations", tools=demo.tools)
        trajectories = tuple(
            Trajectory(
                id=f"{content_hash(demo.origin, messages)}-{j}",
                task_id=task.id,
                task_hash=task.hash,
                task_name=task.name,
                spans=tuple(spans),
                messages=tuple(messages),
                completion=str(messages[-1].get("content") or ""),
                prompt_index=index,
                sample_index=j,
                tokenizer=self.text.fingerprint,
                origin=demo.origin,
                extra=demo.extra,
            )
            for j, spans in enumerate(samples)
        )
        return Group(task=task, trajectories=trajectories)

    def close(self) -> None:
        for verifier in self._verifiers.values():
            if close := getattr(verifier, "close", None):
                close()
        if "rollouts" in self.__dict__:
            self.rollouts.close()


def _way(teacher: TeacherSettings) -> tuple[str, ...]:
    """How a teacher's model runs, where it differs from the default."""
    precision = () if teacher.precision == "auto" else (teacher.precision,)
    return (*addresses(teacher.url), *precision, *((teacher.quantise,) if teacher.quantise else ()))


def has_fast_bfloat16(device: str) -> bool:
    """True where bfloat16 matrix products are faster than float32 ones."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    if device == "cpu":
        flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
        return bool({"amx_bf16", "avx512_bf16"} & set(flags))
    return False


def _sampled(tasks: list[Task], count: int | None, seed: int) -> list[Task]:
    """`count` of the tasks, chosen by seed, in their order."""
    if count is None or count >= len(tasks):
        return tasks if count != 0 else []
    import numpy as np

    chosen = np.random.default_rng(seed).permutation(len(tasks))[:count]
    return [tasks[i] for i in sorted(chosen.tolist())]


def with_examples(task: Task, examples: list[Task]) -> Task:
    """The task with worked examples before it, as earlier turns: the few-shot control."""
    shown: list[Any] = []
    for e in examples:
        shown += [m for m in e.messages if m["role"] != "system"]
        shown.append({"role": "assistant", "content": str(e.metadata.get("solution") or f"The answer is {e.answer}.")})
    head = [m for m in task.messages if m["role"] == "system"]
    rest = [m for m in task.messages if m["role"] != "system"]
    return replace(task, messages=(*head, *shown, *rest))
