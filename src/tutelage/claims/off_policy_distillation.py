"""Claim 5: off-policy distillation is SFT on the teacher's completions, and needs a teacher that is better."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.walks import (
    END,
    SAMPLING,
    Learner,
    WalkText,
    good_teacher,
    grown,
    split_tasks,
    straying,
)
from tutelage.errors import ConfigError
from tutelage.evals.teacher_check import check_teacher
from tutelage.policies.table import TablePolicy
from tutelage.policies.teachers import InProcessTeacher
from tutelage.signals import HardTargets
from tutelage.signals.distribution import TeacherDistribution
from tutelage.sources import Drawn, Recorded
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Trainer, TrainerSettings
from tutelage.types import Draw, Group, Span, Task, Trajectory


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is."""

    tasks: int = 400
    held_out: int = 200
    pretraining: int = 280
    """Most updates of any model from nothing."""
    student: float = 0.4
    worse: float = 0.15
    """Scores at which the training of student and worse teacher stops."""
    completions: int = 2
    """Of the teacher, for each task."""
    epochs: int = 8
    lr: float = 1e-3


# -- the same step -----------------------------------------------------------------------------


def step_difference(student: Learner, teacher: Learner, tasks: Sequence[Task]) -> float:
    """Largest difference of a weight after one step of distillation (teacher's draw) and one of SFT (the same texts
    as somebody's demonstrations, tokenised again, without the teacher's name or log-probabilities)."""
    distilled = student.copy(teachers={"teacher": teacher.model})
    draw = distilled.round(Drawn(tasks, author="teacher", params=SAMPLING), HardTargets(), lr=1e-3)
    tuned = student.copy()
    tuned.round(
        Recorded([Group(task=g.task, trajectories=(as_demonstration(g),)) for g in draw.groups]), HardTargets(), lr=1e-3
    )
    pairs = zip(*(x.model.state_dict().values() for x in (distilled, tuned, student)), strict=True)
    gaps = [(float((a - b).abs().max()), float((a - c).abs().max())) for a, b, c in pairs]
    if max(moved for _, moved in gaps) == 0:
        raise ConfigError("the step moved nothing: it cannot be compared")
    return max(gap for gap, _ in gaps)


def as_demonstration(group: Group) -> Trajectory:
    """The first completion, from its text."""
    (t,) = group.trajectories
    ids = [int(s) for s in t.completion.split()] + ([END] if t.finish == "stop" else [])
    span = Span(token_ids=tuple(ids), role="assistant", author="human", is_sampled=True, is_trainable=True)
    prompt = WalkText().render_prompt(group.task)
    return Trajectory(id="demo", task_id=t.task_id, task_hash=t.task_hash, spans=(*prompt, span))


def expected_gradient_difference(seed: int, *, vocab: int = 4, length: int = 3) -> float:
    """Largest difference between two gradients over every completion of a tabular teacher, each weighted with its
    probability: of SFT on the completion, and of the forward KL to the teacher's distribution at its prefixes."""
    teacher, student = TablePolicy(vocab, seed=seed), TablePolicy(vocab, seed=seed + 1)
    groups = []
    task = Task(id="all", messages=())
    for ids in itertools.product(range(vocab), repeat=length):
        with torch.no_grad():
            logprobs_TV = teacher.logits(torch.tensor([[0, *ids[:-1]]]))[0].log_softmax(-1)
        weight = float(logprobs_TV.gather(-1, torch.tensor(ids).unsqueeze(-1)).sum().exp())
        prompt = Span(token_ids=(0,), role="user", author="user")
        answer = Span(token_ids=ids, role="assistant", author="teacher", is_sampled=True, is_trainable=True)
        t = Trajectory(id=str(ids), task_id="all", task_hash="all", spans=(prompt, answer), weight=weight)
        groups.append(Group(task=task, trajectories=(t,)))
    draw = Draw(groups=tuple(groups), author="teacher")
    hard = gradient_of(student, draw, HardTargets(divisor="sequences"))
    soft = gradient_of(student, draw, TeacherDistribution(InProcessTeacher(teacher), divisor="sequences"))
    return float((hard - soft).abs().max() / soft.abs().max())


def gradient_of(policy: TablePolicy, draw: Draw, signal: HardTargets | TeacherDistribution) -> Tensor:
    """The gradient of one step, whose learning rate is 0."""
    trainer = Trainer(policy, Optimizer(policy.named_parameters(), kind="sgd"), processes=Processes())
    settings = TrainerSettings(lr=0.0, batch_size=None, max_grad_norm=None, max_tokens=1 << 16)
    trainer.step(signal.prepare(draw, score_student=trainer.score).rows, signal, settings, lr=0.0)
    (gradient,) = trainer.optimizer.gradients().values()
    return gradient.clone()


# -- a better and a worse teacher --------------------------------------------------------------


def taught(student: Learner, teacher: Learner, tasks: Sequence[Task], size: Size) -> Learner:
    """The student after SFT on the teacher's completions, all of them: nobody verifies."""
    pupil = student.copy(teachers={"teacher": teacher.model})
    source = Drawn(tasks, author="teacher", n=size.completions, params=SAMPLING)
    pupil.round(source, HardTargets(), lr=size.lr, batch_size=64, epochs=size.epochs)
    return pupil


def is_refused(student: Learner, teacher: Learner, tasks: Sequence[Task]) -> float:
    """1 where the library's teacher check stops the run, 0 where it lets it go on."""
    try:
        check_teacher(
            InProcessTeacher(teacher.copy().model),
            InProcessTeacher(student.copy().model),
            student_result=student.evaluate(tasks),
            teacher_result=replace(teacher.evaluate(tasks), seed=student.seed),
        )
    except ConfigError:
        return 1.0
    return 0.0


def measure(seed: int, size: Size = Size()) -> Numbers:
    """Both identities, and what a better and a worse teacher do to the same student."""
    train, held = split_tasks(seed, train=size.tasks)
    held = held[: size.held_out]
    grow = {"width": 48, "layers": 2, "most": size.pretraining}
    student = grown(seed, "student", train, straying(0.4), until=size.student, **grow)  # type: ignore[arg-type]
    worse = grown(seed, "worse", train, straying(0.4), until=size.worse, **grow)  # type: ignore[arg-type]
    better = good_teacher(seed, train, most=size.pretraining)
    out = {
        "step_difference": step_difference(student, better, train[:64]),
        "expected_gradient_difference": expected_gradient_difference(seed),
        "student": student.pass_at(1, held),
    }
    for name, teacher in (("worse", worse), ("better", better)):
        out[f"teacher_{name}"] = teacher.pass_at(1, held)
        out[f"gain_from_{name}"] = taught(student, teacher, train, size).pass_at(1, held) - out["student"]
        out[f"refused_{name}"] = is_refused(student, teacher, train[: size.held_out])
    return out


CLAIM = Claim(
    name="off_policy_distillation",
    number=5,
    line="off-policy distillation is SFT on the teacher's completions; it needs a teacher that is better at the task",
    source="The chapter, after Hinton et al. 2015, arXiv:1503.02531, and Kim & Rush 2016, arXiv:1606.07947",
    design=(
        "The same step: one update on a teacher's draw against one on the same texts as demonstrations (weights equal "
        "to the bit), and, over all completions of a tabular teacher weighted with their probabilities in float64, "
        "the gradient of SFT against that of the forward KL (equal but for rounding). A better teacher: on walks over "
        "a 5 x 5 grid a student stopped at pass@1 about 0.4 on 128 of its tasks learns 8 epochs from two unfiltered "
        "completions for each of 400 tasks, of a teacher stopped at about 0.15 and of one trained longer, on better "
        "walks; pass@1 on the 200 other tasks. Predicted: the student falls with the worse teacher and rises with the "
        "better, and the library's teacher check refuses the one and lets the other pass."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="step_difference", what="largest difference of a weight after the step", below=1e-9),
        Prediction(
            name="expected_gradient_difference", what="relative difference of the expected gradients", below=1e-10
        ),
        Prediction(name="gain_from_worse", what="gain in pass@1 from the worse teacher", below=0.0),
        Prediction(name="gain_from_better", what="gain in pass@1 from the better teacher", above=0.0),
        Prediction(name="refused_worse", what="share of seeds where the check refused the worse", above=0.99),
        Prediction(name="refused_better", what="share of seeds where the check refused the better", below=0.01),
    ),
    minutes=2.0,
)
