"""Sampling in several processes that share one copy of the weights.

`WorkerSampler` starts `num_workers` processes with `threads` torch threads each. Request i goes to worker i mod N, so
what is drawn never depends on which worker was faster. The weights lie in one piece of memory that every worker
maps; `load` writes new ones into it. Workers end with their parent, however it ends.
"""

import contextlib
import io
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch
from torch import Tensor

from tutelage.errors import ConfigError, SamplerError, TutelageError
from tutelage.policies.sampler import InProcessSampler
from tutelage.types import Completion, Progress, SampleRequest, SamplingParams

_ALIGNMENT = 64


# ------------------------------------------------------------------------------------------------ shared weights


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the shared file."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_parameter: bool


class _SharedModel:
    """A model pickled without its tensors, and the shared memory that holds them."""

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        self._places: list[tuple[_Place, Tensor]] = []
        self._size = 0
        self._by_tensor: dict[int, _Place] = {}
        buffer = io.BytesIO()
        pickler = _ModelPickler(buffer, lambda t: self._place(t, dtype))
        try:
            pickler.dump(model)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SamplerError(
                f"worker processes need a model that can be pickled; {type(model).__name__} cannot ({error}). "
                "Use InProcessSampler, or move its class into an importable module"
            ) from error
        self.pickled = buffer.getvalue()
        self.handle, self.path, self._bytes = _shared_file(max(self._size, 1))
        self._views = {id(t): _view(self._bytes, place) for place, t in self._places}
        with torch.no_grad():
            for _, tensor in self._places:
                self._views[id(tensor)].copy_(tensor)
        self._state_views = {
            name: self._views[id(tensor)]
            for name, tensor in model.state_dict(keep_vars=True).items()
            if id(tensor) in self._views
        }
        self.size = max(self._size, 1)
        self.is_closed = False

    def _place(self, tensor: Tensor, dtype: torch.dtype | None) -> _Place:
        known = self._by_tensor.get(id(tensor))
        if known is not None:
            return known
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        kept = dtype if dtype is not None and is_parameter and tensor.is_floating_point() else tensor.dtype
        offset = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        place = _Place(offset, kept, tuple(tensor.shape), is_parameter)
        self._size = offset + tensor.numel() * torch.empty(0, dtype=kept).element_size()
        self._places.append((place, tensor))
        self._by_tensor[id(tensor)] = place
        return place

    def load(self, state: Mapping[str, Tensor]) -> None:
        unexpected = sorted(set(state) - set(self._state_views))
        written = {self._state_views[name].data_ptr() for name in state if name in self._state_views}
        missing = sorted(
            n for n, view in self._state_views.items() if n not in state and view.data_ptr() not in written
        )
        wrong = sorted(n for n, t in state.items() if n in self._state_views and t.shape != self._state_views[n].shape)
        problems = [
            f"{what}: {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
            for what, names in (("unknown", unexpected), ("missing", missing), ("of another shape", wrong))
            if names
        ]
        if problems:
            raise SamplerError(
                f"new weights need the names and shapes of the sampler's model ({len(self._state_views)} tensors), got "
                f"{'; '.join(problems)}. Pass the state_dict of the same model, with adapters merged"
            )
        with torch.no_grad():
            for name, tensor in state.items():
                self._state_views[name].copy_(tensor)

    def close(self) -> None:
        """Doing it twice does nothing."""
        if self.is_closed:
            return
        self.is_closed = True
        if self.handle is not None:
            os.close(self.handle)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


class _ModelPickler(pickle.Pickler):
    """Writes the place of each tensor instead of the tensor."""

    def __init__(self, file: io.BytesIO, place: Callable[[Tensor], _Place]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._place = place

    def persistent_id(self, obj: Any) -> Any:
        return self._place(obj) if isinstance(obj, Tensor) else None


class _ModelUnpickler(pickle.Unpickler):
    """Puts views of the shared file where the tensors were."""

    def __init__(self, file: io.BytesIO, data: Tensor) -> None:
        super().__init__(file)
        self._data = data
        self._made: dict[_Place, Tensor] = {}

    def persistent_load(self, place: Any) -> Tensor:
        if place not in self._made:
            view = _view(self._data, place)
            self._made[place] = torch.nn.Parameter(view, requires_grad=False) if place.is_parameter else view
        return self._made[place]


def _view(data: Tensor, place: _Place) -> Tensor:
    count = 1
    for size in place.shape:
        count *= size
    width = torch.empty(0, dtype=place.dtype).element_size()
    return data[place.offset : place.offset + count * width].view(place.dtype).view(place.shape)


def _shared_file(size: int) -> tuple[int | None, str, Tensor]:
    """New shared bytes: a handle, the path to map them by in any process that has the handle, and the bytes.

    Linux keeps them in memory without a name, so that they go with their last user however it ends. Elsewhere, or where
    they would take more than half of the memory, the file has a name and no handle, and is to be deleted.
    """
    reasons = []
    if hasattr(os, "memfd_create") and 2 * size <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        handle = os.memfd_create("tutelage-weights")
        try:
            path = f"/proc/self/fd/{handle}"
            return handle, path, _reserved(handle, path, size)
        except (OSError, RuntimeError) as error:
            reasons.append(f"memory: {error}")
            os.close(handle)
    folders = [f for f in ("/dev/shm",) if os.path.isdir(f)] + [tempfile.gettempdir()]
    for folder in folders:
        handle, path = tempfile.mkstemp(prefix=f"tutelage-weights-{os.getpid()}-", dir=folder)
        try:
            return None, path, _reserved(handle, path, size)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
            os.unlink(path)
        finally:
            os.close(handle)
    raise SamplerError(
        f"sharing the weights with worker processes needs {size / 1e6:.0f} MB in memory or in one of "
        f"{', '.join(folders)}; got {'; '.join(reasons)}. Free space, or use InProcessSampler"
    )


def _reserved(handle: int, path: str, size: int) -> Tensor:
    """The file's bytes, reserved now: a full memory disk would otherwise kill the process at the first write."""
    os.posix_fallocate(handle, 0, size)
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------ the worker


class _Reporting:
    """Progress of a worker, told to the parent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def start(self, what: str, total: int, unit: str) -> None:
        """The parent knows the total."""

    def advance(self, amount: int = 1, **numbers: float) -> None:
        self._connection.send(("advance", amount))

    def finish(self) -> None:
        """The parent sees the answers."""


def end_with_parent(connection: int, parent: int) -> None:
    """Have this process end when its parent closes the other end of the connection or is gone.

    A thread waits for that, whatever the main one computes. (The kernel's own signal at a parent's death comes when the
    thread that started this process ends, which may be long before the parent does.)
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(connection, 0)  # reports the end alone
        # Another process that the parent forked may hold its end open.
        while not poll.poll(1000) and os.getppid() == parent:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def worker_main(handle: int, parent: int) -> None:
    """What a worker process runs: answer requests until the parent closes the connection."""
    end_with_parent(handle, parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    connection = Connection(handle)
    try:
        setup = connection.recv()
        torch.set_num_threads(setup["threads"])
        data = torch.from_file(setup["path"], shared=True, size=setup["size"], dtype=torch.uint8)
        model = _ModelUnpickler(io.BytesIO(setup["model"]), data).load()
        sampler = InProcessSampler(model, **pickle.loads(setup["settings"]))
        connection.send(("ready", None))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException as error:
        connection.send(("failed", _portable(error)))
        return
    loads = 0
    while True:
        try:
            requests, params, newest = connection.recv()
        except EOFError:
            return
        try:
            if newest != loads:
                sampler.refresh()
                loads = newest
            answers = sampler.sample(requests, params, progress=_Reporting(connection))
            connection.send(("done", (answers, sampler.engine_name, sampler.engine_notes)))
        except BrokenPipeError:
            return
        except BaseException as error:
            connection.send(("failed", _portable(error)))


def _portable(error: BaseException) -> Any:
    """The error itself where it is one of ours and survives pickling; else its traceback as text."""
    if isinstance(error, TutelageError):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    return "".join(traceback.format_exception(error))


# ------------------------------------------------------------------------------------------------ the parent


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection


class WorkerSampler:
    """Samples in several processes that share one copy of the weights. Implements `types.Sampler`.

    Answers are a function of the weights, the requests, the parameters, `max_batch` and `num_workers`; in float32 of
    the first three.

    Args:
        model: a transformers causal model that can be pickled. Its weights are copied once, at construction; later ones
            come by `load`.
        stop_ids, decode, author, version, max_batch, engine, prefill_tokens: as for `InProcessSampler`. `decode` must
            be importable where the workers run: a tokenizer's own `decode` is, a lambda is not.
        num_workers: processes; None takes one for each core that this process may use.
        threads: torch threads of each.
        dtype: of the shared parameters; None keeps the model's own. Masters in float32 sample faster in bfloat16.

    Raises:
        ConfigError: a number is below 1.
        SamplerError: the model or `decode` cannot be sent to a process, there is no room for the weights, or a worker
            does not start.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        author: str = "student",
        version: str = "base",
        num_workers: int | None = None,
        threads: int = 1,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        count = num_workers if num_workers is not None else available_cores()
        if count < 1 or threads < 1:
            raise ConfigError(f"num_workers and threads must be at least 1, got {count} and {threads}")
        self.author = author
        self.version = version
        self.num_workers = count
        self.engine_name: str | None = None
        self.engine_notes: list[str] = []
        self._threads = threads
        self._loads = 0
        self._workers: list[_Worker] = []
        try:
            self._settings = pickle.dumps({"stop_ids": list(stop_ids), "decode": decode, **settings})
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SamplerError(
                f"worker processes need a `decode` that can be pickled, such as a tokenizer's own; got {decode!r} "
                f"({error}). Move it into an importable module"
            ) from error
        self._shared = _SharedModel(model, dtype)
        self._start()

    def load(self, state: Mapping[str, Tensor], version: str) -> None:
        """Sample from these weights from now on. Not to be called while `sample` runs.

        Args:
            state: the model's state_dict, in any dtype and on any device; tied tensors may be there once.
            version: becomes `self.version`.

        Raises:
            SamplerError: names or shapes differ from the model's; nothing was changed.
        """
        self._shared.load(state)
        self._loads += 1
        self.version = version

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """`n` completions for each request, in order. See `InProcessSampler.sample`.

        Raises:
            SamplerError: a worker died or failed; it is named. The next call starts new ones.
            ConfigError, NumericsError: as from `InProcessSampler.sample`.
        """
        if not self._workers:
            self._start()
        if progress is not None:
            progress.start("sampling", sum(r.n for r in requests), "completions")
        shares = [list(requests[w :: self.num_workers]) for w in range(self.num_workers)]
        answers: list[list[Completion]] = [[] for _ in requests]
        try:
            busy = [w for w, share in enumerate(shares) if share]
            for w in busy:
                self._send(w, (shares[w], params, self._loads))
            for w, (got, name, notes) in self._collect(busy, progress).items():
                answers[w :: self.num_workers] = got
                self.engine_name, self.engine_notes = name, notes
        except BaseException:
            self._stop()  # the others are in the middle of their share, or hold an answer nobody will read
            raise
        if progress is not None:
            progress.finish()
        return answers

    def close(self) -> None:
        """End the workers and give the memory back."""
        self._stop()
        self._shared.close()

    def __enter__(self) -> "WorkerSampler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_shared"):
            self.close()

    def _start(self) -> None:
        paths = [p for p in sys.path if p] or ["."]
        if "" in sys.path:
            paths.insert(0, os.getcwd())
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        setup = {
            "threads": self._threads,
            "path": self._shared.path,
            "size": self._shared.size,
            "model": self._shared.pickled,
            "settings": self._settings,
        }
        try:
            for _ in range(self.num_workers):
                ours, theirs = socket.socketpair()
                with theirs:
                    code = (
                        f"import sys; sys.path[:] = {paths!r}; "
                        f"from {__name__} import worker_main; worker_main({theirs.fileno()}, {os.getpid()})"
                    )
                    process = subprocess.Popen(
                        [sys.executable, "-c", code],
                        pass_fds=[theirs.fileno(), *([] if self._shared.handle is None else [self._shared.handle])],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                    )
                self._workers.append(_Worker(process, Connection(ours.detach())))
            for w in range(self.num_workers):
                self._send(w, setup)
            self._collect(range(self.num_workers), None)
        except BaseException:
            self._stop()
            raise

    def _send(self, w: int, message: Any) -> None:
        try:
            self._workers[w].connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(w) from None

    def _collect(self, busy: Sequence[int], progress: Progress | None) -> dict[int, Any]:
        """What each of these workers answers, by worker; raises for the first that fails."""
        waiting = {self._workers[w].connection: w for w in busy}
        found: dict[int, Any] = {}
        while waiting:
            for ready in wait(list(waiting)):
                connection = cast(Connection, ready)
                w = waiting[connection]
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise self._death(w) from None
                if kind == "advance":
                    if progress is not None:
                        progress.advance(content)
                elif kind == "failed":
                    if isinstance(content, TutelageError):
                        content.add_note(f"raised in sampling worker {w} of {self.num_workers}")
                        raise content
                    raise SamplerError(f"sampling worker {w} of {self.num_workers} failed:\n{content}")
                else:
                    found[w] = content
                    del waiting[connection]
        return found

    def _death(self, w: int) -> SamplerError:
        process = self._workers[w].process
        try:
            code = process.wait(timeout=10)
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            how = "its connection closed"
        return SamplerError(
            f"sampling worker {w} of {self.num_workers} (process {process.pid}) died: {how}. A SIGKILL is usually the "
            "system running out of memory: use fewer workers or a smaller max_batch. The next call starts new workers"
        )

    def _stop(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._workers = []


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
