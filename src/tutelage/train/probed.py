"""Weights as they were when they were probed: what a graduation hands over is among them.

probes/step-0000042/    the weights after 42 updates

A monitor chooses among its last probes. A run that goes back, to a checkpoint or to the start of a round, goes back in
that choice too, so what the choice was there is kept as well.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from tutelage.errors import CheckpointError
from tutelage.train import checkpoint

FOLDER = "probes"


def name_of(step: int) -> str:
    """What `folder_of` finds the weights of a probe by."""
    return f"step-{step:07d}"


def save(run: Path, step: int, write: Callable[[Path], None], *, count: int) -> None:
    """Keep the weights of this step; drop what was probed after it, by updates that were taken back or are done again.

    Args:
        run: the run's folder.
        write: puts the weights into the folder it is given.
        count: a choice is made among so many of the last.
    """
    drop_after(run, step)
    write(run / FOLDER / name_of(step))
    _drop_old(run, step, count)


def drop_after(run: Path, step: int) -> None:
    """The run went back to this step: what was probed later is gone."""
    for path in _found(run):
        if _step(path) > step:
            shutil.rmtree(path)


def folder_of(run: Path, name: str) -> Path:
    """Where the weights are that a probe was made of.

    Raises:
        CheckpointError: they are gone.
    """
    folder = run / FOLDER / name
    if not folder.is_dir():
        raise CheckpointError(
            f"the weights {name!r} were chosen to go on from and are not in {folder.parent}, which holds "
            f"{[p.name for p in _found(run)]}: put them back and resume, or resume from an earlier checkpoint"
        )
    return folder


def _drop_old(run: Path, step: int, count: int) -> None:
    """Leave the last `count` at this step, and those that were the last at each checkpoint or the start of the run."""
    left = checkpoint.checkpoints(run / "checkpoints")
    places = {step, *(_step(p) for p in left)}
    if not any(p.name.endswith("-00000") for p in left):  # the round's start is the run's
        places.add(0)
    found = _found(run)
    wanted = {path for place in places for path in [p for p in found if _step(p) <= place][-count:]}
    for path in found:
        if path not in wanted:
            shutil.rmtree(path)


def _found(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted(p for p in (run / FOLDER).glob("step-*") if p.is_dir())


def _step(path: Path) -> int:
    """The updates in the name of a probe's folder or a checkpoint."""
    return int(path.name.split("-")[1])
