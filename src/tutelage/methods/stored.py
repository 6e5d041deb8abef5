"""A trajectory store as demonstrations: a teacher's answers, or the kept trajectories of an earlier run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutelage.data.store import MANIFEST, TrajectoryStore
from tutelage.errors import DataError, TemplateError
from tutelage.methods.settings import DataSettings
from tutelage.types import Group, Task, Trajectory

Report = Callable[[str, str], None]
"""Called with where a trajectory came from and why it cannot be used."""


def is_store(path: Path) -> bool:
    """True for a folder that a `TrajectoryWriter` or `RoundStore` made."""
    return (path / MANIFEST).is_file()


def stored_groups(path: Path, settings: DataSettings, text: Any, report: Report) -> tuple[list[Group], list[str]]:
    """Kept trajectories (weight not 0) by question, and what was done to them, in sentences.

    Where the ids are the student's tokenizer's they are trained as they were sampled. Others are rendered anew from
    their messages, as a demonstration is; how far the number of tokens drifts is in the sentences.

    Raises:
        DataError: nothing is left; a trajectory is too long and `overlong` is "error".
    """
    groups: dict[str, list[Trajectory]] = {}
    tasks: dict[str, Task] = {}
    counts = {"read": 0, "kept": 0, "exact": 0, "rendered": 0, "before": 0, "after": 0}
    for t in TrajectoryStore(path):
        counts["read"] += 1
        if t.weight == 0 or (settings.limit is not None and counts["kept"] >= settings.limit):
            continue
        counts["kept"] += 1
        where = f"{path.name}/{t.id}"
        is_exact = bool(t.tokenizer) and t.tokenizer == text.fingerprint and t.num_targets > 0
        found = [t] if is_exact else _rendered(t, settings, text, report, where, counts)
        fitting = [f for f in found if f.num_tokens <= settings.max_length]
        if len(fitting) < len(found):
            why = f"{max(f.num_tokens for f in found)} tokens, data.max_length is {settings.max_length}"
            if settings.overlong == "error":
                raise DataError(f"{where}: {why}. Raise it, or set data.overlong to drop.")
            report(where, why)
        counts["exact"] += len(fitting) if is_exact else 0
        key = t.task_hash or t.id
        tasks.setdefault(key, _task(t))
        groups.setdefault(key, []).extend(fitting)
    out = [Group(task=tasks[k], trajectories=tuple(ts)) for k, ts in groups.items() if ts]
    if not out:
        raise DataError(f"{path}: none of {counts['read']} trajectories can be trained on ({counts['kept']} kept)")
    return out, _sentences(path, counts)


def _rendered(
    t: Trajectory, settings: DataSettings, text: Any, report: Report, where: str, counts: dict[str, int]
) -> list[Trajectory]:
    author = next((s.author for s in t.spans if s.is_sampled), str(t.extra.get("author") or "teacher"))
    try:
        samples = text.render_conversation(
            list(t.messages), author=author, train=settings.train_on, tools=t.extra.get("tools") or ()
        )
    except TemplateError as error:
        if settings.on_bad_record == "error":
            raise DataError(f"{where}: {error}") from error
        report(where, str(error))
        return []
    out = [
        replace(t, id=f"{t.id}-{j}", spans=tuple(spans), tokenizer=text.fingerprint, verdict=t.verdict)
        for j, spans in enumerate(samples)
    ]
    counts["rendered"] += 1
    counted = t.num_sampled or int(t.extra.get("completion_tokens") or 0)
    if counted:
        counts["before"] += counted
        counts["after"] += sum(o.num_sampled for o in out)
    return out


def _task(t: Trajectory) -> Task:
    last = max((i for i, m in enumerate(t.messages) if m["role"] != "assistant"), default=0)
    tools = tuple(t.extra.get("tools") or ())
    return Task(id=t.task_id, messages=tuple(t.messages[: last + 1]), name=t.task_name, tools=tools)


def _sentences(path: Path, counts: dict[str, int]) -> list[str]:
    out = [f"{path.name}: {counts['kept']} of {counts['read']} trajectories are kept, {counts['exact']} token-exact"]
    if counts["rendered"]:
        drift = f"; {counts['after'] / counts['before']:.3f} tokens for each counted before" if counts["before"] else ""
        out.append(f"{path.name}: {counts['rendered']} were rendered anew from their messages{drift}")
    return out
