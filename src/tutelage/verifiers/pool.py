"""Killable worker processes for verdicts. A payload that hangs, dies or lies costs its own verdict and nothing else.

The pool starts `worker.py` by path in a fresh interpreter: no import of this package, of torch, or of the caller's main
module. It speaks length-prefixed JSON with it; nothing that comes back is ever unpickled or trusted to have a type.
"""

import json
import math
import os
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutelage.errors import ConfigError, VerifierError

_FOLDER = Path(__file__).parent
_WINDOW = 8  # requests a worker may hold, so that it never waits for the pool between two short ones
_MAX_REPLY_BYTES = 512 * 1024
_GRACE_S = 5.0  # how much longer than its time limit a worker may stay silent before it is killed
_KEPT_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one verdict may use. Going over any of them is an error verdict."""

    time_s: float = 10.0
    """Wall-clock seconds of one verdict."""
    cpu_s: float | None = None
    """Processor seconds of one verdict, whole seconds upwards; None for those of `time_s`, rounded up, and one more."""
    memory_bytes: int = 2 * 1024**3
    """Address space beyond what the worker has loaded before it judges."""
    file_bytes: int = 64 * 1024**2
    """Largest file that judged code may write."""
    open_files: int = 256
    """Open files of one process."""
    processes: int = 64
    """Processes that one verdict may have at a time; counted every 20 ms."""
    start_s: float = 120.0
    """Seconds a worker may take to import the verifier."""

    def __post_init__(self) -> None:
        problems = [
            f"verifier limit {name} must be positive, got {value!r}"
            for name, value in asdict(self).items()
            if value is not None and not value > 0
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one payload came to. `status` is "accept", "reject" or "error"."""

    status: str
    score: float | None
    reason: str
    key: str | None


class _Worker:
    """One worker process and what it has been asked."""

    def __init__(self, pool: "WorkerPool", folder: str) -> None:
        self.asked: deque[int] = deque()
        self.out, self.inbox = bytearray(), bytearray()
        self.is_ready = False
        self.since = time.monotonic()
        """Since when it has owed its next message."""
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-P", str(_FOLDER / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=pool.environment(),
            cwd=folder,
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.write_fd, self.read_fd = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.write_fd, False)
        os.set_blocking(self.read_fd, False)
        self.put(pool.setup(folder))

    def put(self, message: Any) -> None:
        data = json.dumps(message).encode()
        self.out += struct.pack("<I", len(data)) + data

    def flush(self) -> None:
        """Write what the pipe takes now. Raises OSError where nobody reads any more."""
        while self.out:
            try:
                written = os.write(self.write_fd, memoryview(self.out)[: 1 << 16])
            except BlockingIOError:
                return
            del self.out[:written]

    def fill(self) -> bool:
        """Read what is there; False at the end of the stream."""
        while True:
            try:
                data = os.read(self.read_fd, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.inbox += data
            if len(data) < 1 << 16:
                return True

    def pop(self) -> Any:
        """The next whole message, or None. Raises ValueError for what no worker of ours would send."""
        if len(self.inbox) < 4:
            return None
        (size,) = struct.unpack_from("<I", self.inbox)
        if size > _MAX_REPLY_BYTES:
            raise ValueError(f"a message of {size} bytes")
        if len(self.inbox) < 4 + size:
            return None
        message = json.loads(bytes(self.inbox[4 : 4 + size]))
        del self.inbox[: 4 + size]
        if type(message) is not dict:
            raise ValueError("a message that is no object")
        return message

    def kill(self) -> None:
        """End the process and what it has started, and reap it."""
        for pid in [*_descendants(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, 9)
            except (ProcessLookupError, PermissionError):
                continue
        self._reap()

    def stop(self) -> None:
        """Let the process end by itself, which it does at the end of its input; kill it where it does not."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reap()

    def _reap(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        self.process.wait()


def _descendants(pid: int) -> list[int]:
    """Processes under `pid` from /proc, so that those in other sessions go too. Empty where there is no /proc."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        try:
            children = [
                int(c)
                for t in os.listdir(f"/proc/{parent}/task")
                for c in Path(f"/proc/{parent}/task/{t}/children").read_text().split()
            ]
        except OSError:
            continue
        found += children
        todo += children
    return found


class WorkerPool:
    """Workers with one judge loaded, and payloads spread over them.

    Workers start at the first `run`, stay warm, and are replaced when they die. They end with `close`, with the pool,
    or with this process. May be used from any thread (calls wait for each other), pickled (workers are not carried),
    and used in a forked child (which starts its own).
    """

    def __init__(
        self,
        kind: str,
        options: Mapping[str, Any] | None = None,
        *,
        workers: int | None = None,
        limits: Limits | None = None,
        retries: int = 1,
        pass_env: Sequence[str] = (),
        sys_path: Sequence[str] | None = None,
        use_namespace: bool = True,
    ) -> None:
        """Start nothing yet.

        Args:
            kind: which judge, see `judges.build`.
            options: its keyword arguments, JSON values.
            workers: processes; None for the cores this process may use, at most 8.
            limits: of one verdict.
            retries: how often a payload is judged again after its worker was killed from outside. A payload that went
                over a limit, or ended the process itself, is never tried again.
            pass_env: names of environment variables the workers see besides PATH, HOME and the locale. API keys and
                tokens do not reach them otherwise.
            sys_path: where the workers find modules; None for this process's `sys.path`.
            use_namespace: put each worker in a process-id namespace where the system allows it.
        """
        if workers is None:
            workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        if workers < 1 or retries < 0:
            raise ConfigError(f"a verifier needs workers >= 1 and retries >= 0, got {workers} and {retries}")
        self.kind, self.options = kind, dict(options or {})
        self.workers, self.limits, self.retries = workers, limits or Limits(), retries
        self.pass_env, self.use_namespace = tuple(pass_env), use_namespace
        self.sys_path = None if sys_path is None else tuple(sys_path)
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._live: list[_Worker] = []
        self._folders: list[str] = []
        self._finalizer = weakref.finalize(self, _close, self._live, self._folders, self._pid)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def environment(self) -> dict[str, str]:
        """What the workers see of the environment: no secrets, one thread per library, sets in a fixed order."""
        env = {k: os.environ[k] for k in (*_KEPT_ENV, *self.pass_env) if k in os.environ}
        fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if sys.dont_write_bytecode:
            fixed["PYTHONDONTWRITEBYTECODE"] = "1"
        return {**env, **fixed}

    def setup(self, folder: str) -> dict[str, Any]:
        """The first message to a worker."""
        paths = self.sys_path if self.sys_path is not None else [p for p in sys.path if p]
        limits = {**asdict(self.limits), "cpu_s": self.limits.cpu_s or math.ceil(self.limits.time_s) + 1}
        return {
            "judges": str(_FOLDER / "judges"),
            "kind": self.kind,
            "options": self.options,
            "limits": limits,
            "sys_path": list(paths),
            "folder": folder,
            "namespace": self.use_namespace,
        }

    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [w.process.pid for w in self._live] if self._pid == os.getpid() else []

    def run(self, payloads: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Judge every payload; outcomes in order.

        Raises:
            VerifierError: the judge cannot be loaded in a worker. Nothing a payload does raises.
        """
        if self._pid != os.getpid():
            self._live.clear()  # the parent's workers are the parent's
            self._finalizer.detach()
            self._reset()
        if not payloads:
            return []
        with self._lock:
            if not self._folders:
                self._folders.append(tempfile.mkdtemp(prefix="tutelage-verify-"))
            try:
                return _Run(self, self._live, self._folders[0], payloads).outcomes()
            except BaseException:
                _shut(self._live, self._pid, is_patient=False)  # what they were asked is not known any more
                raise

    def close(self) -> None:
        """End the workers and wait for them."""
        if self._pid == os.getpid():
            with self._lock:
                _close(self._live, self._folders, self._pid)


def _shut(live: list[_Worker], pid: int, is_patient: bool = True) -> None:
    if pid != os.getpid():
        return
    for worker in live:
        if is_patient and not worker.asked:
            worker.stop()
        else:
            worker.kill()
    live.clear()


def _close(live: list[_Worker], folders: list[str], pid: int) -> None:
    _shut(live, pid)
    if pid == os.getpid():
        while folders:
            shutil.rmtree(folders.pop(), ignore_errors=True)


class _Run:
    """One call of `WorkerPool.run`: who has been asked what, and what came back."""

    def __init__(
        self, pool: WorkerPool, live: list[_Worker], folder: str, payloads: Sequence[Mapping[str, Any]]
    ) -> None:
        self.pool, self.live, self.folder, self.payloads = pool, live, folder, payloads
        self.todo = deque(range(len(payloads)))
        self.done: list[Outcome | None] = [None] * len(payloads)
        self.num_done = 0
        self.tries = [0] * len(payloads)
        self.failed_starts = 0

    def outcomes(self) -> list[Outcome]:
        for worker in [w for w in self.live if w.process.poll() is not None]:
            self.live.remove(worker)  # died while idle: nobody's verdict
            worker.kill()
        for worker in self.live:
            worker.since = time.monotonic()
        while self.num_done < len(self.payloads):
            self._staff()
            self._hand_out()
            self._exchange()
            self._check_clocks()
        return [o for o in self.done if o is not None]

    def _staff(self) -> None:
        wanted = min(self.pool.workers, len(self.payloads) - self.num_done)
        while len(self.live) < wanted and self.todo:
            self.live.append(_Worker(self.pool, self.folder))

    def _hand_out(self) -> None:
        ready = [w for w in self.live if w.is_ready]
        share = max(1, min(_WINDOW, len(self.todo) // max(1, len(self.live))))
        for worker in ready:
            while self.todo and len(worker.asked) < share:
                index = self.todo.popleft()
                if not worker.asked:
                    worker.since = time.monotonic()
                worker.asked.append(index)
                try:
                    worker.put({"id": index, "payload": self.payloads[index]})
                except (TypeError, ValueError) as e:
                    worker.asked.pop()
                    self._finish(index, _error(f"the task cannot be sent to a worker: {e}"))

    def _exchange(self) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in self.live:
                if worker.asked or not worker.is_ready:
                    selector.register(worker.read_fd, selectors.EVENT_READ, worker)
                if worker.out:
                    selector.register(worker.write_fd, selectors.EVENT_WRITE, worker)
            ready = selector.select(timeout=0.1) if selector.get_map() else []
        for key, mask in ready:
            worker = key.data
            if worker not in self.live:
                continue
            try:
                if mask & selectors.EVENT_WRITE:
                    worker.flush()
                if mask & selectors.EVENT_READ:
                    is_open = worker.fill()
                    while (message := worker.pop()) is not None:
                        self._receive(worker, message)
                    if not is_open:
                        self._lose(worker, "the worker process was killed before its verdict")
            except VerifierError:  # the judge cannot be loaded; a ValueError too, so it goes first
                raise
            except (OSError, ValueError, RecursionError):
                self._lose(worker, "the worker process was lost before its verdict")

    def _receive(self, worker: _Worker, message: dict[str, Any]) -> None:
        worker.since = time.monotonic()
        if not worker.is_ready:
            if message.get("ready") is not True:
                raise VerifierError(
                    f"verifier {self.pool.kind!r} with options {self.pool.options!r} cannot be loaded in a worker: "
                    f"{message.get('reason')}"
                )
            worker.is_ready = True
            return
        if not worker.asked or message.get("id") != worker.asked[0]:
            raise ValueError("an answer to a question that was not asked")
        index = worker.asked.popleft()
        if "died" in message and self.tries[index] < self.pool.retries:
            self.tries[index] += 1
            self.todo.append(index)
        else:
            self._finish(index, _outcome(message, self.pool.limits))

    def _finish(self, index: int, outcome: Outcome) -> None:
        self.done[index] = outcome
        self.num_done += 1

    def _lose(self, worker: _Worker, reason: str) -> None:
        """The worker is gone: what it was judging is tried again or an error, what it had waiting goes to others."""
        self.live.remove(worker)
        was_ready, asked = worker.is_ready, worker.asked
        worker.kill()
        if not was_ready:
            self.failed_starts += 1
            if self.failed_starts >= 3:
                status = worker.process.returncode
                raise VerifierError(
                    f"a worker for verifier {self.pool.kind!r} ended with status {status} before it was ready, three "
                    f"times; check that {sys.executable} starts and has memory to import the verifier"
                )
            return
        if asked:
            first = asked.popleft()
            if self.tries[first] < self.pool.retries:
                self.tries[first] += 1
                self.todo.append(first)
            else:
                self._finish(first, _error(reason))
        self.todo.extendleft(reversed(asked))

    def _check_clocks(self) -> None:
        """The worker keeps the time limit itself; this is for one that cannot any more (stopped, for example)."""
        now = time.monotonic()
        for worker in list(self.live):
            if not worker.is_ready:
                if now - worker.since > self.pool.limits.start_s:
                    raise VerifierError(
                        f"a worker for verifier {self.pool.kind!r} was not ready after {self.pool.limits.start_s} s; "
                        "raise limits.start_s or make the verifier's imports faster"
                    )
            elif worker.asked and now - worker.since > self.pool.limits.time_s + _GRACE_S:
                self.tries[worker.asked[0]] = self.pool.retries  # a hang is never tried again
                self._lose(worker, f"no verdict within {self.pool.limits.time_s:g} s, and the worker did not answer")


def _error(reason: str) -> Outcome:
    return Outcome(status="error", score=None, reason=_storable(reason)[:500], key=None)


def _storable(text: str) -> str:
    """The text with lone surrogates as escapes: what a worker sends may hold them, and no file takes them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _outcome(message: dict[str, Any], limits: Limits) -> Outcome:
    """What a worker said, checked field by field: it may have been written by the code it judged."""
    if message.get("timeout"):
        return _error(f"no verdict within {limits.time_s:g} s")
    for name in ("failed", "died"):
        if name in message:
            return _error(str(message[name]))
    result = message.get("result")
    if type(result) is not dict:
        return _error("the worker sent no result")
    status: Any = result.get("status")
    score: Any = result.get("score")
    reason, key = result.get("reason"), result.get("key")
    if status == "error":
        return _error(str(reason or "the verifier could not judge"))
    if status not in ("accept", "reject"):
        return _error(f"the worker sent the status {status!r:.40}")
    if type(score) not in (int, float) or not 0 <= score <= 1:
        return _error(f"the worker sent the score {score!r:.40}, which is no number in [0, 1]")
    if key is not None and type(key) is not str:
        return _error(f"the worker sent the key {key!r:.40}, which is no text")
    key = None if key is None else _storable(key)
    return Outcome(status=status, score=float(score), reason=_storable(str(reason or ""))[:500], key=key)
