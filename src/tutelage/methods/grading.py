"""From settings to who grades, what it reads, and what is learned from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tutelage.data.logit_cache import LogitCache
from tutelage.errors import ConfigError, DataError
from tutelage.evals import EvalResult, evaluate
from tutelage.evals.teacher_check import TeacherReport, check_teacher
from tutelage.methods.servers import addresses, servers_of
from tutelage.methods.teacher_settings import DivergenceSettings, TeacherSettings
from tutelage.policies.load import resolve_model, weights_digest
from tutelage.policies.teacher_mixed import TeacherMixedSampler
from tutelage.policies.teachers import (
    AveragedTeacher,
    InProcessTeacher,
    SelfTeacher,
    ServedTeacher,
    check_stop_ids,
    check_vocabulary,
)
from tutelage.policies.vllm_server import VLLMScorer
from tutelage.signals import HintedPrompt, MiniLLM, SampledLogRatio, TeacherDistribution, with_hint, with_system
from tutelage.signals.routing import ANY, View
from tutelage.text import ChatText
from tutelage.types import Progress, Signal, Task, Trajectory

if TYPE_CHECKING:
    from tutelage.methods.job import Measuring
    from tutelage.methods.teach import AnswererSettings
    from tutelage.methods.workbench import Workbench

MIXED = "teacher-mixed"
"""The author whose every token is drawn from a mixture of teacher and student."""


def make_teacher(bench: "Workbench", settings: TeacherSettings) -> Any:
    """The teacher as the signals use it, its vocabulary checked against the student's by content.

    Raises:
        ConfigError: another tokenizer, or another end-of-turn token.
    """
    width = bench.policy.output_layer.weight_VD.shape[0]
    if settings.cache is not None:
        return _cached(bench, settings, settings.cache, width)
    if settings.url is not None:
        return _served(bench, settings, width)
    if settings.name in ("self", "average") and bench.student.is_sharded:
        raise ConfigError(
            f"teacher.name={settings.name} reads the student's weights while it is trained, which no process has "
            "whole under distributed.sharding=full: set distributed.sharding=none, or name another teacher"
        )
    if settings.name == "self":
        return SelfTeacher(bench.policy, processes=bench.processes)
    if settings.is_own_average:
        return AveragedTeacher(bench.policy, decay=settings.decay, processes=bench.processes)
    policy = bench.teacher_policy(settings.name, settings.precision, settings.quantise)
    text = ChatText.from_pretrained(resolve_model(bench.beside(settings.name))[0])
    teacher_width = policy.output_layer.weight_VD.shape[0]
    shared = check_vocabulary(bench.text, text, student_width=width, teacher_width=teacher_width)
    check_stop_ids(bench.text.stop_ids, text.stop_ids)
    return InProcessTeacher(policy, name=settings.name, vocab_size=shared, processes=bench.processes)


def _cached(bench: "Workbench", settings: TeacherSettings, cache: str, width: int) -> LogitCache:
    """The written answers of the teacher that is named, by its name or by its weights.

    Raises:
        DataError: they are another teacher's, or the weights have changed since.
    """
    num_ids = 1 + max(bench.text.tokenizer.get_vocab().values())
    found = LogitCache(bench.path(cache), tokenizer=bench.text.fingerprint, vocab_size=width, num_ids=num_ids)
    there = weights_digest(bench.beside(settings.name)) if found.weights else None
    if there is not None and there != found.weights:
        raise DataError(
            f"teacher.cache {found.folder} was written by {found.name!r} with other weights than {settings.name!r} has "
            "now: write the cache again, into another folder, or name its teacher"
        )
    if there is None and found.name != settings.name:
        raise DataError(
            f"teacher.cache {found.folder} holds the answers of {found.name!r}, and teacher.name is {settings.name!r}: "
            f"set teacher.name={found.name}, or write a cache with the teacher you mean"
        )
    return found


def _served(bench: "Workbench", settings: TeacherSettings, width: int) -> ServedTeacher:
    """A teacher behind vLLM servers; the name says whose tokenizer and vocabulary it has."""
    from transformers import AutoConfig

    path = resolve_model(bench.beside(settings.name))[0]
    text = ChatText.from_pretrained(path)
    teacher_width = int(AutoConfig.from_pretrained(path).get_text_config().vocab_size)
    shared = check_vocabulary(bench.text, text, student_width=width, teacher_width=teacher_width)
    check_stop_ids(bench.text.stop_ids, text.stop_ids)
    scorer = VLLMScorer(servers_of(addresses(settings.url), settings.server), workers=settings.server.requests)
    return ServedTeacher(scorer, vocab_size=shared, name=settings.name, processes=bench.processes)


def teacher_signal(
    bench: "Workbench",
    teacher: TeacherSettings,
    d: DivergenceSettings,
    divisor: Any,
    *,
    t_squared: bool,
    teacher_mix: float = 0.0,
) -> Signal:
    """What is learned from the teacher's distribution.

    Args:
        t_squared: what `divergence.t_squared=null` means: Hinton's recipe has the factor, GKD's has not.
        teacher_mix: the teacher's share of what the tokens are sampled from, which bounds the sampler's weights.
    """
    cap = max(2.0, 1.01 / (1 - teacher_mix))  # 1%: what sampler and trainer differ by is no reason to cut
    who: Any = bench.teacher(teacher)
    if teacher.by_task:
        who = {**{task: bench.teacher(t) for task, t in teacher.by_task.items()}, ANY: who}
    for each in who.values() if isinstance(who, dict) else [who]:
        if isinstance(each, ServedTeacher) and d.top_k is not None:
            each.k = d.top_k
    view = _view(bench, teacher)
    if d.kind == "sampled_reverse_kl":
        clip = (d.clip, d.clip) if d.clip else None
        return SampledLogRatio(who, clip=clip, discount=d.discount, sampler_cap=cap, divisor=divisor, view=view)
    if d.kind == "minillm":
        low_high = (0.2, 0.2) if d.clip is None else (d.clip, d.clip)
        return MiniLLM(who, length_norm=d.length_norm, clip=low_high, sampler_cap=cap, divisor=divisor, view=view)
    return TeacherDistribution(
        who,
        d.kind,
        estimator=d.estimator,
        top_k=d.top_k,
        beta=d.beta,
        normalised=d.is_normalised,
        skew=d.skew,
        alpha=d.alpha,
        temperature=d.temperature,
        t_squared=t_squared if d.t_squared is None else d.t_squared,
        divisor=divisor,
        view=view,
    )


def told(teacher: "TeacherSettings | AnswererSettings") -> Callable[[Task], Task] | None:
    """The task as the teacher is shown it; None where it reads what the student reads."""
    changes = [with_system(teacher.system_prompt)] if teacher.system_prompt else []
    changes += [with_hint(teacher.hint)] if teacher.hint else []
    if not changes:
        return None

    def change(task: Task) -> Task:
        for each in changes:
            task = each(task)
        return task

    return change


def _view(bench: "Workbench", teacher: TeacherSettings) -> View | None:
    """What each task's teacher reads in place of the student's trajectory."""
    views: dict[str, View] = {}
    for task_name, each in ((ANY, teacher), *teacher.by_task.items()):
        if (change := told(each)) is not None:
            views[task_name] = HintedPrompt(bench.text, change)
    if not views:
        return None

    def view(task: Task, trajectory: Trajectory) -> Trajectory:
        own = task.name if task.name in teacher.by_task else ANY
        return views[own](task, trajectory) if own in views else trajectory

    return view


def mixed_sampler(bench: "Workbench") -> TeacherMixedSampler:
    """Samples every token from share · teacher + (1 - share) · student, for the stage that asks for it.

    Raises:
        ConfigError: stages ask for several mixtures, or for one with a server.
    """
    stages = [s for s in bench.config.stages if getattr(s, "teacher_mix", 0.0) > 0]
    stage = stages[0]
    if any((s.teacher, s.teacher_mix) != (stage.teacher, stage.teacher_mix) for s in stages):
        raise ConfigError("stages of one run can have one teacher_mix, of one teacher: leave it out of the others")
    if bench.rollouts.is_served:
        raise ConfigError("teacher_mix samples with both models in this process: set rollout.engine=inprocess")
    return TeacherMixedSampler(
        bench.student.plain.model,
        bench.teacher_policy(stage.teacher.name, stage.teacher.precision, stage.teacher.quantise).model,
        share=stage.teacher_mix,
        stop_ids=bench.text.stop_ids,
        decode=bench.text.completion_text,
        author=MIXED,
        max_batch=stage.rollout.max_batch,
    )


# -- is the teacher better? ----------------------------------------------------------------------


def teachers_of(stage: Any) -> Iterator[tuple[str, TeacherSettings]]:
    """(task family or "*", teacher) of a stage; nothing where it has none."""
    teacher: TeacherSettings | None = getattr(stage, "teacher", None)
    if teacher is not None:
        yield from ((ANY, teacher), *teacher.by_task.items())


def check_one(
    bench: "Workbench",
    teacher: TeacherSettings,
    measuring: "Measuring",
    student: EvalResult,
    *,
    tasks: Sequence[Task],
    allow_worse: bool,
    progress: Progress | None = None,
) -> TeacherReport:
    """Teacher against student on the same tasks, the teacher as it will be used: with its hint and system prompt.

    Args:
        student: an evaluation of the student on at least these tasks, samples included where logits are compared.

    Raises:
        ConfigError: the teacher is not better and has to be.
    """
    settings = bench.config.evaluation
    assert settings is not None
    change = told(teacher)
    shown = tasks if change is None else [change(t) for t in tasks]
    taught = evaluate(
        bench.sampler(bench.author_of(teacher), "teacher"),
        shown,
        measuring.verifier,
        text=bench.text,
        n=settings.n,
        params=measuring.params,
        seed=settings.seed,
        ks=(1,),
        greedy=False,
        chance=False,
        progress=progress,
    )
    bench.policy.use_plain_attention()
    has_logits = teacher.url is None
    own = only(student, {t.id for t in tasks})
    by_teacher, by_student = taught.trajectories[:32], own.trajectories[:32]
    asked: Sequence[Trajectory] = by_teacher
    seen: Sequence[Trajectory] = by_student
    if change is not None and has_logits:
        plain, hinted = {t.id: t for t in tasks}, {t.id: t for t in shown}
        unhinted = HintedPrompt(bench.text, lambda task: plain[task.id])
        asked = [unhinted(hinted[t.task_id], t) for t in by_teacher]
        view = HintedPrompt(bench.text, change)
        seen = [view(plain[t.task_id], t) for t in by_student]
    report = check_teacher(
        SelfTeacher(bench.student.plain) if has_logits else None,
        bench.teacher(teacher.model_copy(update={"cache": None})) if has_logits else None,
        student_result=own,
        teacher_result=taught,
        teacher_trajectories=asked,
        teacher_views=by_teacher,
        student_trajectories=by_student,
        student_views=seen,
        is_exempt=teacher.is_own_average,
        allow_worse=allow_worse,
    )
    if teacher.cache is not None:
        bench.release_teacher(teacher)
    return report


def unchecked(bench: "Workbench", teacher: TeacherSettings, *, is_measured: bool) -> str | None:
    """Why a teacher is not compared with its student before a run; None where it is.

    Args:
        is_measured: there are held-out questions with a verifier.
    """
    if not teacher.is_checked:
        return "teacher.is_checked is false"
    if teacher.is_own_average:
        return "an average of the student"
    if not is_measured:
        return "no held-out questions with a verifier"
    if teacher.cache is not None:
        try:
            bench.teacher_policy(teacher.name, teacher.precision, teacher.quantise)
        except ConfigError as error:
            return f"the teacher of the cache cannot be loaded: {error}"
    return None


def tasks_of(stage: Any, name: str, tasks: Sequence[Task]) -> Sequence[Task]:
    """The tasks that a teacher of a stage is responsible for; none for a default one whose every task has its own.

    Args:
        name: the task family, or "*".

    Raises:
        ConfigError: a task family has a teacher of its own and no question to compare on.
    """
    names = {name for name, _ in teachers_of(stage)} - {ANY}
    own = [t for t in tasks if (t.name == name if name != ANY else t.name not in names)]
    if not own and name != ANY:
        there = sorted({t.name for t in tasks})
        raise ConfigError(f"teacher.by_task has {name!r}, and no held-out question is of it; there are {there}")
    return own


def tasks_by_teacher(stage: Any, tasks: Sequence[Task]) -> Iterator[tuple[str, TeacherSettings, Sequence[Task]]]:
    """Each teacher of a stage with the tasks it is responsible for, where there are any.

    Raises:
        ConfigError: as `tasks_of`.
    """
    for name, teacher in teachers_of(stage):
        if own := tasks_of(stage, name, tasks):
            yield name, teacher, own


def only(result: EvalResult, ids: set[str]) -> EvalResult:
    """The part of an evaluation that is about the given tasks."""
    if ids >= {c.task_id for c in result.counts}:
        return result
    kept = tuple(t for t in result.trajectories if t.task_id in ids)
    counts = tuple(c for c in result.counts if c.task_id in ids)
    return replace(result, counts=counts, greedy_counts=None, trajectories=kept, greedy_trajectories=())


def check_name(name: str, teacher: TeacherSettings) -> dict[str, Any]:
    """Which teacher a line of the event log is about."""
    return {"teacher": teacher.name, **({} if name == ANY else {"task": name})}
