"""What a session leaves on disk: sound whatever fails on the way, and found again by every process."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tutelage.errors import CheckpointError, Interrupted, SamplerError, TutelageError
from tutelage.policies.table import TablePolicy
from tutelage.signals import HardTargets
from tutelage.sources.drawn import Drawn
from tutelage.train import checkpoint
from tutelage.train.distributed import Processes
from tutelage.train.loop import Stage
from tutelage.train.optim import Optimizer
from tutelage.train.run_directory import RunDirectory
from tutelage.train.session import Session, Weights
from tutelage.train.trainer import Trainer, TrainerSettings
from tutelage.types import Span, Task, Trajectory

TASK = Task(id="t", messages=({"role": "user", "content": "?"},))


OPEN: list[RunDirectory] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


class Table(TablePolicy):
    """With the one thing more that a session asks of a policy."""

    def use_plain_attention(self) -> None:
        """There is none."""


class OneOf(Processes):
    """One of several processes that are threads here."""

    def __init__(self, index: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        super().__init__()
        self._index, self.barrier, self.board = index, barrier, board

    @property
    def count(self) -> int:
        return self.barrier.parties

    @property
    def index(self) -> int:
        return self._index

    def wait(self) -> None:
        self.barrier.wait(timeout=20)

    def _gather(self, value: Any) -> list[Any]:
        self.board[self.index] = value
        self.wait()
        out = [self.board[i] for i in range(self.count)]
        self.wait()
        return out


def session(root: Path, processes: Processes | None = None) -> Session:
    """A session of a tabular policy."""
    processes = processes or Processes()
    policy = Table(5)
    OPEN.append(RunDirectory(root, is_writer=processes.is_first))
    optimizer = Optimizer(policy.named_parameters(), kind="sgd")

    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(dict(optimizer.weights()), folder / "model.safetensors")

    return Session(
        run=OPEN[-1],
        trainer=Trainer(policy, optimizer, processes=processes),
        weights=Weights(
            save=save,
            load=lambda folder: load_file(folder / "model.safetensors"),
            load_base=dict,
            sampler=lambda name, version: None,  # type: ignore[arg-type,return-value]
        ),
        text=None,
        seed=0,
    )


def stage(**more: Any) -> Stage:
    settings = TrainerSettings(lr=0.1, batch_size=None)
    return Stage(name="s", source=Drawn([TASK]), signal=HardTargets(), trainer=settings, **more)


def together(count: int, work: Callable[[Processes], None]) -> list[BaseException | None]:
    """Do it in so many processes at once; what each raised."""
    barrier, board = threading.Barrier(count), {}  # type: ignore[var-annotated]
    errors: list[BaseException | None] = [None] * count

    def one(index: int) -> None:
        try:
            work(OneOf(index, barrier, board))
        except BaseException as error:
            errors[index] = error
            if not isinstance(error, TutelageError):  # which all of them raise
                barrier.abort()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=30)
    return errors


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_several_processes_fall_back_to_one_checkpoint_and_the_first_deletes_the_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = session(tmp_path)
    for step in (1, 2):
        before.cursor.total_steps = step
        before.save(None)
    old, new = checkpoint.checkpoints(tmp_path / "checkpoints")
    flipped(new / "model" / "model.safetensors")
    found: dict[int, Session] = {}
    deleted: list[str] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: deleted.append(Path(path).name))

    def resume(processes: Processes) -> None:
        found[processes.index] = session(tmp_path, processes)
        assert found[processes.index].resume()

    assert together(2, resume) == [None, None]
    assert [found[i].cursor.total_steps for i in (0, 1)] == [1, 1]
    assert deleted == [new.name]
    events = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["checkpoint"] for e in events] == [new.name]
    flipped(old / "model" / "model.safetensors")
    errors = together(2, resume)
    assert [type(e) for e in errors] == [CheckpointError, CheckpointError] and "all 2 checkpoints" in str(errors[1])


def test_a_checkpoint_is_never_absent_while_another_of_its_name_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(text: str) -> Callable[[Path], None]:
        return lambda folder: (folder / "weights").write_text(text) and None  # type: ignore[func-returns-value]

    checkpoint.save(tmp_path, "step-1-0-0-0", write("first"), {}, keep=1)
    replace = os.replace

    def killed(a: Any, b: Any) -> None:
        if str(a).endswith("step-1-0-0-0.tmp"):
            raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        checkpoint.save(tmp_path, "step-1-0-0-0", write("second"), {}, keep=1)
    found = checkpoint.newest_good(tmp_path, lambda *_: None)
    assert found is not None and (found[0] / "weights").read_text() == "first"
    path = checkpoint.save(tmp_path, "step-1-0-0-0", write("third"), {}, keep=1)
    assert (path / "weights").read_text() == "third" and [p.name for p in tmp_path.iterdir()] == ["step-1-0-0-0"]


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths in the order they were forced to disk and renamed."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(f"-> {b}"), replace(a, b))[1])
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_folders_of_a_checkpoint_are_on_disk_before_it_has_its_name(tmp_path: Path, flushed: list[str]) -> None:
    session(tmp_path).save(None)
    (path,) = checkpoint.checkpoints(tmp_path / "checkpoints")
    work = path.with_name(f".{path.name}.tmp")
    named = flushed.index(f"-> {path}")
    files = {str(p).replace(str(path), str(work)) for p in [path, *path.rglob("*")]}
    assert files <= set(flushed[:named]) and str(work / "model") in files


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_scores_before_a_rounds_first_update_are_on_disk_before_they_have_their_name(
    tmp_path: Path, flushed: list[str]
) -> None:
    spans = (
        Span(token_ids=(1,), role="user", author="user"),
        Span(token_ids=(2, 3), role="assistant", author="student", is_sampled=True, is_trainable=True),
    )
    one = session(tmp_path)
    scores = one._score_once(stage())([Trajectory(id="a", task_id="t", task_hash="h", spans=spans)])
    (path,) = tmp_path.glob("work/*/student_logprobs-*.npz")
    assert flushed[1] == f"-> {path}" and path.name in flushed[0]
    assert np.load(path)["values"].tolist() == list(scores[0])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_server_that_fails_before_the_first_draw_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    def start(ctx: Any) -> None:
        raise SamplerError("nobody answers")

    monitor = SimpleNamespace(start=start, state=dict, restore=lambda state: None)
    one = session(tmp_path)
    with pytest.raises(Interrupted, match="nobody answers"):
        one.enter(stage(monitors=(monitor,)))
    again, then = session(tmp_path), stage(monitors=(SimpleNamespace(state=dict, restore=lambda state: None),))
    assert again.resume()
    again.enter(then)
    assert then.source.state() == stage().source.state()


def test_tensors_are_exactly_those_saved(tmp_path: Path) -> None:
    one = session(tmp_path)
    with torch.no_grad():
        one.trainer.policy.table_VD.normal_()
    one.trainer.optimizer.set_weights({"table_VD": one.trainer.policy.table_VD.detach().clone()})
    one.save(None)
    again = session(tmp_path)
    assert again.resume()
    assert torch.equal(again.trainer.policy.table_VD, one.trainer.policy.table_VD)
