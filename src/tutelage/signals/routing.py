"""Which teacher grades which trajectory, and what the teacher is shown in its place.

Dimension letters:  N  targets of a batch   E  teacher's hidden width
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.collate import Batch, collate
from tutelage.data.pack import microbatches
from tutelage.errors import ConfigError, DataError, TemplateError
from tutelage.types import Draw, Span, TargetRow, Task, Trajectory

View = Callable[[Task, Trajectory], Trajectory]
"""What the teacher reads instead of a trajectory: another context before the very same targets."""

ANY = "*"
UNGRADED = -1
"""In place of a teacher's index: nobody grades the row."""


class Router:
    """One teacher for everything, or one for each task family.

    Args:
        teachers: a teacher, or task name -> teacher; "*" takes every task without one of its own.
        view: what teachers read in place of a trajectory; None shows them the trajectory itself.
    """

    def __init__(self, teachers: Any, view: View | None = None) -> None:
        by_task = dict(teachers) if isinstance(teachers, Mapping) else {ANY: teachers}
        if not by_task:
            raise ConfigError("a distillation signal needs at least one teacher, got none")
        self.view = view
        self.teachers: list[Any] = []
        self._of_task: dict[str, int] = {}
        for task, teacher in by_task.items():
            if not any(t is teacher for t in self.teachers):
                self.teachers.append(teacher)
            self._of_task[task] = next(i for i, t in enumerate(self.teachers) if t is teacher)
        self.names = _distinct([str(getattr(t, "name", "teacher")) for t in self.teachers])
        self.trajectories: list[Trajectory] = []
        """What the teachers read, by the index in `prepare`'s rows."""
        self.teacher_of: list[int] = []
        """Which teacher grades each of them."""

    def prepare(self, draw: Draw, rows: Sequence[TargetRow]) -> None:
        """Remember what each row's teacher is and reads.

        Raises:
            DataError: a task has no teacher, or a view changed the targets.
        """
        tasks = {id(t): g.task for g in draw.groups for t in g.trajectories}
        missing = sorted({r.trajectory.task_name for r in rows} - self._of_task.keys())
        if missing and ANY not in self._of_task:
            raise DataError(
                f"no teacher for the tasks {missing}; there are teachers for {sorted(self._of_task)}. "
                'Add one for each task family, or one under "*" for all others.'
            )
        self.teacher_of = [self._of_task.get(r.trajectory.task_name, self._of_task.get(ANY, 0)) for r in rows]
        self.trajectories = [r.trajectory for r in rows]
        if self.view is not None:
            view = self.view
            self.trajectories = [
                _checked(view(tasks[id(r.trajectory)], r.trajectory), r.trajectory) if r.is_trained else r.trajectory
                for r in rows
            ]

    def columns(self, index: int, num_targets: int) -> dict[str, Any]:
        """Columns that lead from a target back to its row and teacher."""
        return {
            "prepared_row_C": np.full(num_targets, index, dtype=np.int64),
            "teacher_C": np.full(num_targets, self.teacher_of[index], dtype=np.int64),
        }

    def ungraded_columns(self, trajectory: Trajectory) -> dict[str, Any]:
        """Columns of a row that no teacher is asked about, beside the prepared ones."""
        self.trajectories.append(trajectory)
        self.teacher_of.append(UNGRADED)
        return self.columns(len(self.trajectories) - 1, trajectory.num_targets)

    def hidden(self, batch: Batch) -> Tensor:
        """(N, E) hidden states of each target's own teacher; E is the widest teacher's, narrower ones end in zeros."""
        is_graded = UNGRADED not in self.teacher_of
        if len(self.teachers) == 1 and self.view is None and is_graded and _fits(batch, self.teachers[0]):
            only: Tensor = self.teachers[0].hidden(batch)
            return only
        widths = [t.output_layer.weight_VD.shape[1] for t in self.teachers]
        dtype = torch.float32
        for t in self.teachers:
            dtype = torch.promote_types(dtype, t.output_layer.weight_VD.dtype)
        if all(t.output_layer.weight_VD.dtype == torch.bfloat16 for t in self.teachers):
            dtype = torch.bfloat16
        out_NE = torch.zeros(batch.num_targets, max(widths), dtype=dtype, device=batch.token_ids_BT.device)
        for index, teacher in enumerate(self.teachers):
            for part in microbatches(self.rows_for(batch, index), max_tokens=teacher.max_tokens, layout=teacher.layout):
                own = collate(part, layout=teacher.layout).to(out_NE.device)
                hidden_NE = teacher.hidden(own).to(dtype)
                out_NE[own.columns["place_C"], : hidden_NE.shape[1]] = hidden_NE
        return out_NE

    def rows_for(self, batch: Batch, teacher: int) -> list[TargetRow]:
        """What one teacher reads of a batch: `place_C` says which of the batch's targets each target is."""
        if "prepared_row_C" not in batch.columns:
            raise DataError("the batch was not made from this signal's prepared rows: prepare the draw first")
        order = torch.arange(batch.num_targets)
        row_of, index_of = batch.row_index_C.cpu(), batch.target_index_C.cpu()
        prepared, teacher_of = batch.columns["prepared_row_C"].cpu(), batch.columns["teacher_C"].cpu()
        rows = []
        for row in row_of.unique().tolist():
            own = row_of == row
            if int(teacher_of[own][0]) != teacher:
                continue
            trajectory = self.trajectories[int(prepared[own][0])]
            weight, place = np.zeros(trajectory.num_targets), np.zeros(trajectory.num_targets, dtype=np.int64)
            targets = index_of[own].numpy()
            weight[targets], place[targets] = 1.0, order[own].numpy()
            rows.append(TargetRow(trajectory=trajectory, columns={"weight_C": weight, "place_C": place}, count=0.0))
        return rows

    # -- state ---------------------------------------------------------------------------------

    def after_step(self, policy: Any) -> None:
        for teacher in self.teachers:
            if hasattr(teacher, "after_step"):
                teacher.after_step(policy)

    def state(self) -> dict[str, Any]:
        return {n: dict(t.state()) for n, t in zip(self.names, self.teachers, strict=True) if hasattr(t, "state")}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, teacher in zip(self.names, self.teachers, strict=True):
            if name in state and hasattr(teacher, "restore"):
                teacher.restore(state[name])

    def save(self, folder: Path) -> None:
        """Weights that are not anywhere else (an averaged teacher's), one folder for each teacher."""
        for name, teacher in zip(self.names, self.teachers, strict=True):
            if hasattr(teacher, "save"):
                teacher.save(folder / _file_name(name))

    def load(self, folder: Path) -> None:
        for name, teacher in zip(self.names, self.teachers, strict=True):
            if hasattr(teacher, "load"):
                teacher.load(folder / _file_name(name))


class HintedPrompt:
    """The teacher is asked another question than the student: with a hint, a demonstration or a system prompt.

    The trained tokens stay the same; only the prompt before the first of them is rendered anew. In a conversation of
    several turns that prompt is the messages up to the first trained turn, and the turns after it follow as they are.
    A `view` for the distillation signals.

    Args:
        text: `text.ChatText`.
        hint: the task as the teacher is to see it; `with_system`, `with_hint` make common ones.

    Raises (when used):
        DataError: what stands before the first trained token is no prompt of the trajectory's messages.
    """

    def __init__(self, text: Any, hint: Callable[[Task], Task]) -> None:
        self.text, self.hint = text, hint

    def __call__(self, task: Task, trajectory: Trajectory) -> Trajectory:
        first = next((i for i, s in enumerate(trajectory.spans) if s.is_trainable), None)
        if first is None:
            return trajectory
        asked, header, dropped = self._asked(task, trajectory, trajectory.spans[:first])
        prompt = self.text.render_prompt(self.hint(asked))
        ids = _ids(prompt)
        if dropped and ids[-len(dropped) :] != dropped:
            raise DataError(
                f"the template begins the answer of trajectory {trajectory.id!r} in another way than that of its "
                "prompt with the hint: leave the hint out, or use a template that begins all answers alike"
            )
        prompt = _cut(prompt, 0, len(ids) - len(dropped))
        return replace(trajectory, spans=(*prompt, *header, *trajectory.spans[first:]))

    def _asked(
        self, task: Task, trajectory: Trajectory, before: Sequence[Span]
    ) -> tuple[Task, list[Span], tuple[int, ...]]:
        """The part of the conversation that `before` shows; what a template adds after its prompt (an empty think
        block), and what its prompt has at the end that `before` has not."""
        shown = _ids(before)
        for messages in _prompts(task, trajectory):
            asked = replace(task, messages=messages)
            try:
                prompt = self.text.render_prompt(asked)
            except TemplateError:  # the template does not take this part on its own
                continue
            ids = _ids(prompt)
            common = min(len(ids), len(shown))
            rest, dropped = _cut(before, common, len(shown)), _cut(prompt, common, len(ids))
            if ids[:common] == shown[:common] and all(s.role == "template" for s in (*rest, *dropped)):
                return asked, rest, _ids(dropped)
        raise DataError(
            f"the teacher's hint or system prompt goes into the prompt of trajectory {trajectory.id!r}, and its "
            f"{len(shown)} tokens before the first trained one are not what the chat template makes of its messages: "
            "render the data anew with the student's tokenizer and template, or leave the teacher's hint and system "
            "prompt out"
        )


def _prompts(task: Task, trajectory: Trajectory) -> Iterator[tuple[Any, ...]]:
    """Parts of a conversation that end where the assistant is to speak: from its beginning, then (an overlong one that
    was split) without its earlier turns."""
    own, whole = tuple(task.messages), tuple(trajectory.messages)
    conversations = [whole] if whole[: len(own)] == own else [own, whole]
    for messages in conversations:
        roles = [m["role"] for m in messages]
        ends = [i for i in range(1, len(roles) + 1) if roles[i - 1] != "assistant" == (*roles, "assistant")[i]]
        lead = len(list(takewhile(lambda role: role in ("system", "developer"), roles)))
        for end in ends:
            yield messages[:end]
        for end in ends:
            yield from ((*messages[:lead], *messages[i:end]) for i in range(lead + 1, end) if roles[i] == "user")


def _ids(spans: Iterable[Span]) -> tuple[int, ...]:
    return tuple(token for s in spans for token in s.token_ids)


def _cut(spans: Iterable[Span], start: int, stop: int) -> list[Span]:
    """The spans of a stretch of a prompt, by token."""
    out, at = [], 0
    for s in spans:
        ids = s.token_ids[max(0, start - at) : max(0, stop - at)]
        at += len(s.token_ids)
        if ids:
            kept = s if len(ids) == len(s.token_ids) else Span(token_ids=ids, role=s.role, author=s.author)
            out.append(kept)
    return out


def with_system(prompt: str) -> Callable[[Task], Task]:
    """A hint that puts a system prompt first (in place of the task's own, where it has one)."""

    def change(task: Task) -> Task:
        rest = tuple(m for m in task.messages if m["role"] != "system")
        return replace(task, messages=({"role": "system", "content": prompt}, *rest))

    return change


def with_hint(template: str) -> Callable[[Task], Task]:
    """A hint after the last message: `template` with {answer} and the task's metadata filled in.

    Raises:
        ConfigError: the template is no format string of named fields, e.g. "{}" or an unpaired brace.
        DataError: (when used) the template asks for something the task does not have.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        if not all(re.match(r"[^.\[\d]", name) for name in names):
            raise ValueError("a field without a name")
    except ValueError as error:
        raise ConfigError(
            f"the hint {template!r} must be text with named fields, e.g. {{answer}}, and has {error}; write {{{{ and "
            "}} for braces themselves"
        ) from error

    def change(task: Task) -> Task:
        known = {**task.metadata, "answer": task.answer}
        if task.answer is None and any(re.split(r"[.\[]", name)[0] == "answer" for name in names):
            raise DataError(f"the hint {template!r} needs an answer and task {task.id!r} has none")
        try:
            hint = template.format(**known)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"the hint {template!r} needs {error} and task {task.id!r} has {sorted(known)}: name fields that "
                "every task has"
            ) from error
        *before, last = task.messages
        return replace(task, messages=(*before, {**last, "content": f"{last['content']}\n\n{hint}"}))

    return change


def _fits(batch: Batch, teacher: Any) -> bool:
    return batch.cu_seqlens is None or bool(teacher.supports_packing)


def _checked(seen: Trajectory, own: Trajectory) -> Trajectory:
    """The view, once it is clear that its targets are the trajectory's own."""

    def targets(t: Trajectory) -> list[int]:
        return [token for token, hit in zip(t.token_ids, t.is_target, strict=True) if hit]

    if targets(seen) != targets(own):
        raise DataError(
            f"the teacher's view of trajectory {own.id!r} has {seen.num_targets} targets and the student's "
            f"{own.num_targets}, or other ids: only what comes before the answer may change"
        )
    return seen


def _distinct(names: Sequence[str]) -> list[str]:
    return [n if names.count(n) == 1 else f"{n}#{i}" for i, n in enumerate(names)]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
