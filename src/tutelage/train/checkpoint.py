"""Resumable states: written whole under another name, flushed, renamed; at most `keep` of them.

checkpoints/step-0000042-00-00001-00003/    updates made, stage, round, updates made in the round
  model/                 full weights, or the adapter: transformers and peft load it as it is
  optimizer.safetensors  moments and step counts
  state.json             cursor, sources, signals, monitors, log sizes, and every file's size and SHA-256
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tutelage.data.files import sync_folder, sync_tree
from tutelage.errors import CheckpointError
from tutelage.train.run_directory import write_atomically

STATE = "state.json"


def save(folder: Path, name: str, write: Callable[[Path], None], state: Mapping[str, Any], *, keep: int) -> Path:
    """Make one checkpoint and drop the oldest beyond `keep`.

    Args:
        write: puts the weights and the optimiser's state into the folder it is given.
        state: JSON-able; what the loop needs to go on.

    Raises:
        CheckpointError: the disk is full or failed. Earlier checkpoints are intact.
    """
    try:
        return _save(folder, name, write, state, keep)
    except OSError as error:
        shutil.rmtree(folder / f".{name}.tmp", ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {name} could not be written to {folder}: {error}. The {len(checkpoints(folder))} made before "
            "it are intact: make room and resume the run."
        ) from error


def _save(folder: Path, name: str, write: Callable[[Path], None], state: Mapping[str, Any], keep: int) -> Path:
    put_back(folder)
    for stale in folder.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    work = folder / f".{name}.tmp"
    work.mkdir(parents=True)
    write(work)
    files = {
        str(p.relative_to(work)): {"bytes": p.stat().st_size, "sha256": _digest(p)}
        for p in sorted(work.rglob("*"))
        if p.is_file()
    }
    write_atomically(work / STATE, json.dumps({**state, "files": files}))
    sync_tree(work)
    final, before = folder / name, folder / f".{name}.old"
    if final.exists():  # a round that is done again: there is always one of the two
        os.replace(final, before)
    os.replace(work, final)
    sync_folder(folder)
    shutil.rmtree(before, ignore_errors=True)
    drop_old(folder, keep)
    return final


def put_back(folder: Path) -> None:
    """Undo or finish a replacement that was cut: the checkpoint set aside takes its name again if no other has it."""
    for before in folder.glob(".step-*.old"):
        final = folder / before.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            shutil.rmtree(before)
        else:
            os.replace(before, final)


def place_of(path: Path) -> tuple[int, int]:
    """The stage and round that a checkpoint was made in."""
    stage, round_ = path.name.split("-")[2:4]
    return int(stage), int(round_)


def drop_old(folder: Path, keep: int) -> None:
    """Leave at most `keep`: the newest, and among them the newest made at the start of a round, which a gate goes back
    to. With `keep` 1 only the newest is left."""
    found = checkpoints(folder)
    left = found[-max(1, keep) :]
    starts = [p for p in found if p.name.endswith("-00000")][-1:]
    if keep > 1 and starts and starts[0] not in left:
        left = [*starts, *left[1:]]
    for old in found:
        if old not in left:
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first. Unfinished ones have another name."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def newest_good(folder: Path, on_bad: Callable[[Path, str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files are all as they were written; None if there is none at all.

    Args:
        on_bad: told of each damaged checkpoint that was passed over, and why.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    put_back(folder)
    found = checkpoints(folder)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            state: dict[str, Any] = json.loads((path / STATE).read_text())
            return path, state
        on_bad(path, problem)
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints in {folder} are damaged, the newest because {damage(found[-1])}. "
            "Start the run again in a new folder; its trajectories can still be read."
        )
    return None


def damage(path: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None."""
    try:
        state = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        return f"{STATE} cannot be read ({error})"
    for name, facts in state.get("files", {}).items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
        if _digest(file) != facts["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
