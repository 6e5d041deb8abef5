"""What on-policy distillation is built from, besides its method file: who samples, what comes along, what watches."""

from typing import TYPE_CHECKING

from tutelage.data.texts import load_texts
from tutelage.errors import ConfigError
from tutelage.methods.grading import MIXED, teacher_signal
from tutelage.monitors.validation import ValidationLoss
from tutelage.signals.pretraining import PRETRAINING, WithPretraining
from tutelage.sources import Beside, Drawn, Recorded
from tutelage.sources.adaptive import AdaptiveShare
from tutelage.sources.gkd import Share, StudentShare
from tutelage.types import Group, Monitor, Signal, Source

if TYPE_CHECKING:
    from tutelage.methods.distill_on_policy import DistillOnPolicy
    from tutelage.methods.workbench import Workbench


def source_of(settings: "DistillOnPolicy", bench: "Workbench") -> Source:
    """The student (or the mixture with its teacher) on tasks; or on a share of the recorded prompts."""
    rollout = settings.rollout
    author = MIXED if settings.teacher_mix > 0 else "student"
    source: Source
    if settings.data is not None and (settings.student_share < 1 or settings.adaptive is not None):
        share: Share = settings.student_share
        if (a := settings.adaptive) is not None:
            share = AdaptiveShare(start=a.start, step=a.step, tolerance=a.tolerance)
        source = StudentShare(
            _recorded(settings, bench)[0],
            share=share,
            params=bench.sampling(rollout),
            n=rollout.n,
            author=author,
            per_round=rollout.prompts_per_round,
            rounds=settings.rounds,
            buffer_size=settings.adaptive.buffer_size if settings.adaptive else 0,
        )
    else:
        assert settings.tasks is not None
        source = Drawn(
            bench.train_tasks(settings.tasks),
            author=author,
            n=rollout.n,
            params=bench.sampling(rollout),
            per_round=rollout.prompts_per_round,
            chunk_rows=rollout.chunk_rows,
        )
    if (text := settings.pretraining) is None:
        return source
    loaded = load_texts(
        bench.path(text.path), bench.tokenizer, field=text.field, max_length=text.max_length, name=PRETRAINING
    )
    for problem in loaded.problems:
        bench.notes.append(f"text left out: {problem.origin}: {problem.reason}")
    return Beside(source, Recorded(loaded.groups, per_round=text.per_round))


def signal_of(settings: "DistillOnPolicy", bench: "Workbench") -> Signal:
    """What the teacher says, with the loss of plain text beside it where that is asked for."""
    signal = teacher_signal(
        bench,
        settings.teacher,
        settings.divergence,
        settings.train.divisor,
        t_squared=False,
        teacher_mix=settings.teacher_mix,
    )
    if settings.pretraining is None:
        return signal
    return WithPretraining(signal, coefficient=settings.pretraining.coefficient)


def monitors_of(settings: "DistillOnPolicy", bench: "Workbench") -> tuple[Monitor, ...]:
    """The validation loss that an adaptive share listens to."""
    if settings.adaptive is None:
        return ()
    kept_out = [t for g in _recorded(settings, bench)[1] for t in g.trajectories]
    return (ValidationLoss(kept_out, bench.trainer, every_rounds=settings.adaptive.every_rounds),)


def _recorded(settings: "DistillOnPolicy", bench: "Workbench") -> tuple[list[Group], list[Group]]:
    """Recorded prompts to train on and to validate on; every second one at most is kept out, spread over the file."""
    assert settings.data is not None
    groups = bench.demonstrations(settings.data)
    if settings.adaptive is None:
        return groups, []
    count = min(settings.adaptive.validation, len(groups) // 2)
    if count == 0:
        raise ConfigError(f"an adaptive share validates on recorded prompts; data has {len(groups)}, needed: 2 or more")
    kept_out = {i * len(groups) // count for i in range(count)}
    return [g for i, g in enumerate(groups) if i not in kept_out], [groups[i] for i in sorted(kept_out)]
