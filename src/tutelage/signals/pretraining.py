"""Plain text learned beside a distillation: MiniLLM's pretraining loss.

Dimension letters:  C  targets of a chunk   V  vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import ConfigError, DataError
from tutelage.numerics.logprobs import target_logprobs
from tutelage.types import Draw, TargetRow, Targets, Trajectory

PRETRAINING = "pretraining"
"""Task name of the texts."""
IS_TEXT = "is_text_C"
_LOSS, _TARGETS = "pretraining/nats", "pretraining/targets"

Columns = Mapping[str, Tensor]


class WithPretraining:
    """A distillation signal plus the mean cross-entropy of plain text:

    loss = distillation loss + coefficient * L_PT,   L_PT = -mean over the texts' targets of log p_student

    Each term has its own divisor. The step's divisor counts both kinds of targets, and the weights put that right:
    exactly where a draw is one update, in expectation where it is cut into several.

    Texts are the trajectories of the task family "pretraining" (`sources.Beside`); no teacher is asked about them and
    no metric of the distillation counts them.

    Args:
        signal: what is learned from everything else: `TeacherDistribution`, `SampledLogRatio` or `MiniLLM`.
        coefficient: weight of the texts' loss.

    Raises:
        ConfigError: the coefficient is not positive, or the divisor is "sequences": a text has no end of its own.

    Source:
        Gu et al. 2023 (MiniLLM), arXiv:2306.08543, section 2.3, whose code has coefficient 1.
    """

    def __init__(self, signal: Any, *, coefficient: float = 1.0) -> None:
        if not coefficient > 0:
            raise ConfigError(f"coefficient must be positive, got {coefficient}: it weighs the texts' loss")
        if signal.divisor == "sequences":
            raise ConfigError('divisor="sequences" has no meaning for pieces of plain text: use "targets"')
        self.signal, self.coefficient = signal, coefficient
        self.loss = WithPretrainingLoss(self)
        self._sums = {_LOSS: 0.0, _TARGETS: 0.0}

    @property
    def divisor(self) -> str:
        return str(self.signal.divisor)

    def prepare(self, draw: Draw, *, score_student: Callable[[Sequence[Trajectory]], list[Sequence[float]]]) -> Targets:
        """The inner signal's rows and the texts', weighted as the class says.

        Raises:
            DataError: the draw has no text, or nothing else.
        """
        texts = [t for g in draw.groups if g.task.name == PRETRAINING for t in g.trajectories if t.num_targets]
        rest = replace(draw, groups=tuple(g for g in draw.groups if g.task.name != PRETRAINING))
        inner = self.signal.prepare(rest, score_student=score_student)
        counted = sum(r.count for r in inner.rows)
        num_text = sum(t.num_targets for t in texts)
        if num_text == 0 or counted <= 0:
            what = "no text" if num_text == 0 else "no other trajectory to learn from"
            raise DataError(f"a pretraining loss beside a distillation needs both, and this draw has {what}")
        total = counted + num_text
        rows = [_scaled(r, total / counted) for r in inner.rows]
        rows += [self._text_row(t, self.coefficient * total / num_text, inner.rows[0]) for t in texts]
        stats = {**inner.stats, "data/num_text_targets": float(num_text)}
        return Targets(rows=rows, divisor=inner.divisor, stats=stats)

    def _text_row(self, text: Trajectory, weight: float, like: TargetRow) -> TargetRow:
        """The inner signal's columns, empty, so that both kinds fit into one batch."""
        n = text.num_targets
        columns: dict[str, Any] = {}
        for name, column in like.columns.items():
            column = np.asarray(column)
            columns[name] = np.zeros((n, *column.shape[1:]), dtype=column.dtype)
        router = getattr(self.signal, "router", None)
        if router is not None:
            columns |= router.ungraded_columns(text)
        columns |= {"weight_C": np.full(n, weight), IS_TEXT: np.ones(n, dtype=np.int64)}
        return TargetRow(trajectory=text, columns=columns, count=float(n))

    def annotate(self, batch: Any) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.signal.annotate(batch)
        return found

    def after_step(self, policy: Any) -> None:
        self.signal.after_step(policy)

    def state(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.signal.state()
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        self.signal.restore(state)

    def save(self, folder: Path) -> None:
        self.signal.save(folder)

    def load(self, folder: Path) -> None:
        self.signal.load(folder)

    # -- what was learned ----------------------------------------------------------------------

    def add(self, hard_C: Tensor) -> None:
        """Count the texts' cross-entropies of a chunk."""
        self._sums[_LOSS] += float(hard_C.detach().sum())
        self._sums[_TARGETS] += len(hard_C)

    def take_sums(self) -> dict[str, float]:
        out = {**self.signal.take_sums(), **self._sums}
        self._sums = {_LOSS: 0.0, _TARGETS: 0.0}
        return out

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The inner signal's, and the texts' mean loss."""
        out: dict[str, float] = dict(self.signal.metrics({k: v for k, v in sums.items() if k not in self._sums}))
        if sums.get(_TARGETS, 0.0) > 0:
            out["distill/pretraining_nats_per_target"] = sums[_LOSS] / sums[_TARGETS]
        return out


class WithPretrainingLoss:
    """Cross-entropy at the texts' targets, the inner loss at all others. Neither sees the other's."""

    def __init__(self, signal: WithPretraining) -> None:
        self.signal = signal

    def prepare_chunk(self, columns_C: Columns) -> Columns:
        """The inner loss's own, on its own targets."""
        prepare = getattr(self.signal.signal.loss, "prepare_chunk", None)
        own_C = columns_C[IS_TEXT] == 0
        if prepare is None or bool(own_C.all()):
            return columns_C if prepare is None else prepare(columns_C)
        if not bool(own_C.any()):
            return {n: c for n, c in columns_C.items() if n != "teacher_hidden_CE"}
        made = prepare({n: c[own_C] for n, c in columns_C.items()})
        out = {n: c for n, c in columns_C.items() if n in made}
        for name, column in made.items():
            if name not in out:
                whole = column.new_zeros((len(own_C), *column.shape[1:]))
                whole[own_C] = column
                out[name] = whole
        return out

    def __call__(self, student_logits_CV: Tensor, targets_C: Columns) -> Tensor:
        inner = self.signal.signal.loss
        text_C = targets_C[IS_TEXT] != 0
        if not bool(text_C.any()):
            found: Tensor = inner(student_logits_CV, targets_C)
            return found
        hard_C = -target_logprobs(student_logits_CV[text_C], targets_C["target_ids_C"][text_C])
        self.signal.add(hard_C)
        out_C = torch.zeros(len(text_C), dtype=hard_C.dtype, device=hard_C.device).index_put((text_C,), hard_C)
        if bool(text_C.all()):
            return out_C
        own_C = ~text_C
        soft_C = inner(student_logits_CV[own_C], {n: c[own_C] for n, c in targets_C.items()})
        return out_C.index_put((own_C,), soft_C.to(out_C.dtype))


def _scaled(row: TargetRow, factor: float) -> TargetRow:
    n = row.trajectory.num_targets
    columns = {**row.columns, "weight_C": row.columns["weight_C"] * factor, IS_TEXT: np.zeros(n, dtype=np.int64)}
    return replace(row, columns=columns)
