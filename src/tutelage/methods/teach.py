"""What `tutelage teacher` does: answers of a teacher, a cache of its distributions, a comparison with the student."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tutelage.data.files import write_json
from tutelage.data.logit_cache import write_logit_cache
from tutelage.data.rounds import RoundStore
from tutelage.data.store import MANIFEST, TrajectoryStore, TrajectoryWriter, remove_store
from tutelage.errors import ConfigError, SamplerError
from tutelage.evals import evaluate
from tutelage.evals.teacher_check import TeacherReport
from tutelage.methods import grading
from tutelage.methods.config import RunConfig, load_config, load_settings
from tutelage.methods.job import measuring_of
from tutelage.methods.servers import addresses
from tutelage.methods.settings import (
    ModelSettings,
    Positive,
    RolloutSettings,
    Settings,
    SystemSettings,
    TaskSettings,
    TextFilterSettings,
    VerifierSettings,
)
from tutelage.methods.teacher_settings import TeacherSettings
from tutelage.methods.workbench import Confirm, Workbench
from tutelage.policies.endpoint import Answer, EndpointSampler, RequestJournal
from tutelage.policies.http import RateLimit
from tutelage.policies.load import weights_digest
from tutelage.policies.sampler import InProcessSampler
from tutelage.policies.vllm_server import VLLMSampler, VLLMServer
from tutelage.sources import Drawn, Judged
from tutelage.sources.cleaned import NO_ANSWER, Cleaned, TextRules, left_out
from tutelage.types import Draw, DrawContext, Group, Progress, Source, Task, Trajectory, content_hash

REPORT, JOURNAL = "generate.json", "asked.jsonl"


class AnswererSettings(Settings):
    """Who answers."""

    name: str
    """A folder or hub name; for an endpoint the name it knows."""
    url: str | tuple[str, ...] | None = None
    """A server's address (vllm: or several); null loads the model into this process."""
    kind: Literal["vllm", "endpoint"] = "endpoint"
    """What is at the url: a vLLM server (token ids in and out), or any OpenAI-compatible endpoint (text)."""
    tokenizer: str | None = None
    """vllm: folder or hub name of the tokenizer; null takes `name`."""
    api_key_env: str | None = None
    """Environment variable with the key."""
    hint: str | None = None
    """Shown to the teacher only, after the question; may hold {answer} or any field of the task's metadata."""
    system_prompt: str | None = None
    """Shown to the teacher only, in place of the system prompt that is stored."""
    workers: Positive = 8
    """Requests under way at a time."""
    requests_per_s: float | None = Field(None, gt=0)
    """Rate limit."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Rate limit, prompts included."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """endpoint: further fields of every request; null leaves one out."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """endpoint: what it calls the longest completion."""
    sends_seed: bool = True
    """endpoint: false where the field is refused."""
    journal: str | None = None
    """endpoint: file of requests and replies, in which a request is looked up before it is sent; null is `asked.jsonl`
    in `out`. Another `out` with other filters, or a larger `rollout.n`, then asks only for what is missing."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights in this process."""
    quantise: Literal["4bit", "8bit"] | None = None
    """In this process: load the linear layers in 8 bits (LLM.int8) or 4 (NF4), through bitsandbytes."""

    @model_validator(mode="after")
    def _sensible(self) -> "AnswererSettings":
        if self.kind == "vllm" and not addresses(self.url):
            raise ValueError("teacher.kind=vllm needs teacher.url, the server's address")
        if self.kind == "endpoint" and len(addresses(self.url)) > 1:
            raise ValueError(
                "teacher.url: an endpoint has one address; only vLLM servers (teacher.kind=vllm) may be several"
            )
        return self

    @property
    def is_text(self) -> bool:
        """An endpoint, which takes messages and gives text."""
        return self.url is not None and self.kind == "endpoint"


class FilterSettings(TextFilterSettings):
    """Which answers are left out, besides those a verifier rejects. They are marked, not removed."""

    truncated: bool = True
    """What ran into the length limit."""
    duplicates: bool = True
    """All but the first of a question's equal answers."""


class GenerateSettings(Settings):
    """Settings of `tutelage teacher generate`."""

    teacher: AnswererSettings
    tasks: TaskSettings
    verifier: VerifierSettings | None = None
    """Leaves out what it does not accept; null judges nothing."""
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=1, chunk_rows=64))
    filters: FilterSettings = Field(default_factory=FilterSettings)
    out: str
    """Folder of the trajectory store."""
    seed: int = 0
    """Of the samples."""
    system_prompt: str | None = None
    """Put before every question."""
    licence: str = ""
    """Licence and terms of the teacher's outputs, kept with every trajectory."""
    system: SystemSettings = Field(default_factory=SystemSettings)


SHARED = ("tasks", "verifier", "rollout", "seed", "system")
"""What a method's config shares with these settings; `_answerer` says what of its teacher."""
_NOT_ASKED = {"workers", "requests_per_s", "tokens_per_minute", "journal", "api_key_env"}
"""Settings of a teacher that change no answer."""


def generate_settings(config: Path | Mapping[str, Any] | None, overrides: Sequence[str] = ()) -> GenerateSettings:
    """From a YAML file of these settings, or of a method with a teacher and tasks, and `key=value`s that win."""

    def taken(body: dict[str, Any]) -> dict[str, Any]:
        if "method" not in body:
            return body
        model = body.get("model") or {}
        teacher = _answerer(body.get("teacher") or {}, model)
        return {
            **{k: body[k] for k in SHARED if k in body},
            "teacher": teacher,
            "system_prompt": model.get("system_prompt"),
        }

    return load_settings(GenerateSettings, config if config is not None else {}, overrides, change=taken)


def _answerer(teacher: Any, model: Mapping[str, Any]) -> Any:
    """Who answers, from a method's `teacher`, whose url is always a vLLM server's."""
    if not isinstance(teacher, Mapping):
        return teacher
    known = AnswererSettings.model_fields
    out = {k: v for k, v in teacher.items() if k in known or k not in TeacherSettings.model_fields}
    if out.get("name") == "self":
        out["name"] = model.get("name") or ModelSettings().name
    if out.get("url"):
        names = {"requests": "workers", "api_key_env": "api_key_env"}
        server = teacher.get("server") or {}
        out = {"kind": "vllm", **{names[k]: v for k, v in server.items() if k in names}, **out}
    return out


def generate(
    settings: GenerateSettings,
    folder: Path,
    *,
    progress: Progress | None = None,
    confirm: Confirm | None = None,
) -> dict[str, Any]:
    """Let the teacher answer every task `rollout.n` times, judge, mark, and write a trajectory store.

    Resumable: answers are committed in chunks (an endpoint's one by one), verdicts too; the same settings go on where
    they stopped, and finished ones answer at once, but for requests that failed: those are sent again. Other settings
    need another folder.

    Returns:
        What `generate.json` holds: counts, why answers were left out, and tokens.

    Raises:
        ConfigError: the folder holds answers to other settings. SamplerError: the teacher does not answer; what it has
            answered is kept.
    """
    out = Path(settings.out)
    asked = content_hash(settings.model_dump(mode="json", exclude={"out": True, "system": True, "teacher": _NOT_ASKED}))
    done = _done(out, asked)
    if done and not (settings.teacher.is_text and done["left_out"].get(NO_ANSWER)):
        return {**done, "was_done": True}
    work = out / ".work" / asked
    work.mkdir(parents=True, exist_ok=True)
    if settings.teacher.is_text:
        _unjudge_failed(work)
    name = _model_name(settings.teacher.tokenizer or settings.teacher.name, folder)
    model = ModelSettings(name=name, precision=settings.teacher.precision, system_prompt=settings.system_prompt)
    bench = Workbench(
        RunConfig(model=model, seed=settings.seed, system=settings.system, evaluation=None), folder, confirm=confirm
    )
    with ExitStack() as stack:
        stack.callback(bench.close)
        source, answerer = _source(settings, bench, work, stack)
        if settings.verifier is not None:
            source = Judged(source, bench.verifier(settings.verifier))
        source = Cleaned(source, TextRules(**settings.filters.model_dump()))
        is_text = settings.teacher.is_text
        ctx = DrawContext(
            seed=settings.seed,
            stage=0,
            round=0,
            sampler=None if is_text else lambda _: answerer,
            text=None if is_text else bench.text,
            store=work,
            progress=progress,
        )
        draw = source.draw(ctx)
    report = _report(settings, draw, answerer) | {"settings_hash": asked}
    if report["left_out"].get(NO_ANSWER) == len(draw):
        last = next(t.extra.get("error") for t in reversed(list(draw)))
        raise SamplerError(f"none of {len(draw)} requests was answered; the last: {last}")
    (out / REPORT).unlink(missing_ok=True)
    remove_store(out)
    metadata = {"generate": settings.model_dump(mode="json"), "settings_hash": asked}
    with TrajectoryWriter(out, metadata=metadata) as writer:
        writer.write_all(replace(t, licence=settings.licence) for t in draw)
    write_json(out / REPORT, report, kept="The trajectories are written.")
    shutil.rmtree(work.parent)
    return report


def _done(out: Path, asked: str) -> dict[str, Any] | None:
    """The report of these settings' answers, or None where they are not all written.

    Raises:
        ConfigError: the folder holds answers to other settings.
    """
    has_store = (out / MANIFEST).exists()
    report: dict[str, Any] = json.loads((out / REPORT).read_text()) if (out / REPORT).exists() else {}
    there = {report.get("settings_hash")} if report else set()
    there |= {TrajectoryStore(out).metadata.get("settings_hash")} if has_store else set()
    if there - {asked}:
        raise ConfigError(
            f"{out} holds answers to other settings: choose another folder with out= (with an endpoint, "
            f"teacher.journal={out / JOURNAL} keeps it from being asked the same twice)"
        )
    return report if report and has_store else None


def _unjudge_failed(work: Path) -> None:
    """Forget the verdicts beside a failed request, which is sent again."""
    store = RoundStore(work / "judged")
    for chunk in store.committed():
        if any(t.finish == "error" for t in store.load(chunk) or ()):
            store.discard(chunk)


def _source(settings: GenerateSettings, bench: Workbench, work: Path, stack: ExitStack) -> tuple[Source, Any]:
    """The teacher's answers, and who gives them."""
    teacher, rollout = settings.teacher, settings.rollout
    tasks = bench.train_tasks(settings.tasks)
    params = bench.sampling(rollout)
    shown = grading.told(teacher)
    if teacher.is_text:
        journal = stack.enter_context(RequestJournal(teacher.journal or Path(settings.out) / JOURNAL))
        limit = None
        if teacher.requests_per_s or teacher.tokens_per_minute:
            limit = RateLimit(requests_per_s=teacher.requests_per_s, tokens_per_minute=teacher.tokens_per_minute)
        asker = EndpointSampler(
            addresses(teacher.url)[0],
            teacher.name,
            api_key_env=teacher.api_key_env,
            journal=journal,
            workers=teacher.workers,
            limit=limit,
            extra=teacher.extra,
            max_tokens_field=teacher.max_tokens_field,
            sends_seed=teacher.sends_seed,
        )
        return Asked(tasks, asker, n=rollout.n, params=params, shown=shown), asker
    sampler: Any
    if teacher.url is not None:
        sampler = VLLMSampler(
            [VLLMServer(url, api_key_env=teacher.api_key_env) for url in addresses(teacher.url)],
            stop_ids=bench.text.stop_ids,
            decode=bench.text.decode,
            author=teacher.name,
            workers=teacher.workers,
        )
    else:
        sampler = InProcessSampler(
            bench.teacher_policy(bench.config.model.name, teacher.precision, teacher.quantise).model,
            stop_ids=bench.text.stop_ids,
            decode=bench.text.completion_text,
            author=teacher.name,
            max_batch=rollout.max_batch,
            engine=rollout.decoding,
        )
    drawn = Drawn(
        tasks,
        author=teacher.name,
        n=rollout.n,
        params=params,
        chunk_rows=rollout.chunk_rows,
        is_shuffled=False,
        view=None if shown is None else lambda task, _: shown(task),
    )
    return drawn, sampler


class Asked:
    """Answers of an OpenAI-compatible endpoint: messages without token ids.

    Args:
        shown: the task as the endpoint is to see it; the answer is stored behind the plain one.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        asker: EndpointSampler,
        *,
        n: int,
        params: Any,
        shown: Callable[[Task], Task] | None = None,
    ) -> None:
        self.tasks, self.asker, self.n, self.params, self.shown = tuple(tasks), asker, n, params, shown

    def draw(self, ctx: DrawContext) -> Draw:
        if ctx.progress:
            ctx.progress.start(f"asking {self.asker.author}", len(self.tasks) * self.n, "answers")
        tasks = self.tasks if self.shown is None else [self.shown(t) for t in self.tasks]
        found = self.asker.ask(tasks, self.n, self.params, progress=ctx.progress)
        if ctx.progress:
            ctx.progress.finish()
        groups = tuple(
            Group(task=task, trajectories=tuple(self._trajectory(task, i, j, a) for j, a in enumerate(answers)))
            for i, (task, answers) in enumerate(zip(self.tasks, found, strict=True))
        )
        return Draw(groups=groups, author=self.asker.author)

    def _trajectory(self, task: Task, i: int, j: int, answer: Answer) -> Trajectory:
        return Trajectory(
            id=f"p{i}n{j}",
            task_id=task.id,
            task_hash=task.hash,
            task_name=task.name,
            spans=(),
            messages=(*task.messages, answer.message),
            completion=answer.text,
            prompt_index=i,
            sample_index=j,
            finish=answer.finish,
            extra={
                "author": answer.model or self.asker.author,
                "completion_tokens": answer.completion_tokens,
                "tools": [dict(t) for t in task.tools],
                **({"error": answer.error} if answer.error else {}),
            },
        )

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """There is no cursor: everything is asked at once."""


def _report(settings: GenerateSettings, draw: Draw, answerer: Any) -> dict[str, Any]:
    answers = list(draw)
    tokens: dict[str, int]
    if isinstance(answerer, EndpointSampler):
        tokens = {k: v for k, v in answerer.counts.items() if k.endswith(("tokens", "tokens_cached"))}
    else:
        prompts = sum(t.num_tokens - t.num_sampled for g in draw.groups for t in g.trajectories[:1])
        tokens = {"prompt_tokens": prompts, "completion_tokens": sum(t.num_sampled for t in answers)}
    return {
        "store": settings.out,
        "teacher": settings.teacher.name,
        "num_tasks": len(draw.groups),
        "num_answers": len(answers),
        "num_kept": sum(t.weight != 0 for t in answers),
        "num_tasks_with_kept": sum(any(t.weight != 0 for t in g.trajectories) for g in draw.groups),
        "left_out": left_out(answers),
        "tokens": tokens,
        "was_done": False,
    }


# -- the logit cache ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How a logit cache is made."""

    k: int | None = None
    """Entries kept; None takes the most that fit in 220 bytes a token."""
    precision: str = "packed"
    max_kl: float | None = None


def cache(
    config: Path | Mapping[str, Any],
    out: Path,
    overrides: Sequence[str] = (),
    *,
    options: CacheOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what a teacher says at every target of recorded trajectories, rendered as the config's student reads them.

    Args:
        config: a distillation config with `teacher` and `data`: `cache_config` makes one of these two. Its student's
            tokenizer, template and system prompt, its data settings and `divergence.temperature` are those of the run
            that will read the cache.

    Raises:
        ConfigError: nothing to cache in the config; student and teacher have different tokenizers; `out` holds another
            cache. DataError: `max_kl` is exceeded.
    """
    o = options or CacheOptions()
    run, folder = load_config(config, overrides)
    stage = next((s for s in run.stages if getattr(s, "teacher", None) and getattr(s, "data", None)), None)
    if stage is None:
        raise ConfigError("a cache is written for recorded trajectories: the config needs teacher.name and data.path")
    teacher = _cacheable(stage.teacher)
    bench = Workbench(run, folder)
    who = bench.teacher(teacher)
    found = bench.demonstrations(stage.data)
    written = write_logit_cache(
        out,
        [t for g in found for t in g.trajectories],
        who,
        vocab_size=who.vocab_size or who.output_layer.weight_VD.shape[0],
        tokenizer=bench.text.fingerprint,
        weights=weights_digest(bench.beside(teacher.name)) or "",
        k=o.k,
        temperature=getattr(stage.divergence, "temperature", None) or 1.0,
        precision=o.precision,
        max_kl=o.max_kl,
        progress=progress,
    )
    return {
        "cache": str(out),
        "teacher": teacher.name,
        "num_trajectories": len(written),
        "num_tokens": written.num_tokens,
        "k": written.k,
        "bytes_per_token": int(written.facts["bytes_per_token"]),
        "fidelity": written.fidelity,
        "notes": bench.notes,
    }


def cache_config(teacher: str, data: str, *, student: str | None = None) -> dict[str, Any]:
    """The config that stands for a teacher and what it is to read; whatever is too long is left out.

    Args:
        data: a trajectory store (what is kept of it) or a file of demonstrations.
        student: whose tokenizer and template render the demonstrations; None takes the teacher's.
    """
    return {
        "method": "distill_off_policy",
        "model": {"name": _model_name(student or teacher, Path.cwd())},
        "teacher": {"name": teacher},
        "data": {"path": data, "overlong": "drop"},
        "divergence": {"kind": "forward_kl"},
    }


def _cacheable(teacher: TeacherSettings) -> TeacherSettings:
    """The live teacher.

    Raises:
        ConfigError: a cache cannot hold its answers.
    """
    odd = [name for name in ("hint", "system_prompt", "by_task", "url") if getattr(teacher, name)]
    if odd or teacher.name == "self" or teacher.is_own_average:
        what = f"teacher.{odd[0]}" if odd else f"teacher.name={teacher.name}"
        raise ConfigError(
            f"a logit cache holds one fixed model's answers to what the student reads, written in this process: {what} "
            "needs the live teacher"
        )
    return teacher.model_copy(update={"cache": None})


# -- the check ----------------------------------------------------------------------------------


def check(
    config: Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    confirm: Confirm | None = None,
) -> dict[str, TeacherReport]:
    """Compare teachers and student of a distillation config on its held-out questions, as a run would; train nothing.

    Returns:
        Task family -> report; "*" for the teacher of all families without one of their own.

    Raises:
        ConfigError: no stage has a teacher, or there are no questions with a verifier.
    """
    run, folder = load_config(config, overrides)
    stage = next((s for s in run.stages if getattr(s, "teacher", None) is not None), None)
    if stage is None:
        raise ConfigError("no stage of this config has a teacher: set teacher.name")
    if run.evaluation is None:
        raise ConfigError("evaluation is null in this config: there is nothing to compare on")
    bench = Workbench(run, folder, confirm=confirm)
    try:
        measuring = measuring_of(run, bench)
        if measuring is None:
            raise ConfigError(
                "comparing a teacher needs held-out questions and a verifier: set tasks.heldout and verifier"
            )
        compared = list(grading.tasks_by_teacher(stage, measuring.tasks))
        for _, teacher, _ in compared:  # a teacher that is missing is missed before anything is sampled
            bench.sampler(bench.author_of(teacher), "teacher")
        student = evaluate(
            bench.sampler("student", "student"),
            measuring.tasks,
            measuring.verifier,
            text=bench.text,
            n=run.evaluation.n,
            params=measuring.params,
            seed=run.evaluation.seed,
            ks=(1,),
            greedy=False,
            chance=False,
            progress=progress,
        )
        bench.policy.use_plain_attention()
        return {
            name: grading.check_one(
                bench, teacher, measuring, student, tasks=tasks, allow_worse=True, progress=progress
            )
            for name, teacher, tasks in compared
        }
    finally:
        bench.close()


def _model_name(name: str, folder: Path) -> str:
    """A run's folder stands for its model."""
    found = [p for p in (folder / name, Path(name)) if (p / "model" / "config.json").exists()]
    return str(found[0] / "model") if found else name
