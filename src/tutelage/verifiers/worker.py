"""A verifier worker: run by path as a script, in its own process, by `pool.WorkerPool`. Standard library only.

Three levels of process, each killable by the one above:

  keeper     holds the process-id namespace where there is one; ends when the pool's process ends
  server     has the judge imported, reads requests, never runs judged text; forks
  child      judges; killed at the limits. One child serves many payloads, or, where the judge `isolates`, one.

After an isolated verdict every process the child has left behind is killed, whatever session it moved to: the server is
the namespace's first process, or their subreaper.
"""

import contextlib
import gc
import importlib.util
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CLONE_NEWUSER, CLONE_NEWPID = 0x10000000, 0x20000000
MAX_REPLY_BYTES = 256 * 1024


class Channel:
    """Length-prefixed JSON over two file descriptors."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd, self.buffer, self.is_closed = read_fd, write_fd, bytearray(), False

    def fill(self) -> None:
        """Read what is there; blocks where nothing is."""
        data = os.read(self.read_fd, 1 << 16)
        self.is_closed = self.is_closed or not data
        self.buffer += data

    def pop(self, limit: int | None = None) -> Any:
        """The next whole message, or None. Raises ValueError beyond `limit` bytes or where it is no JSON."""
        if len(self.buffer) < 4:
            return None
        (size,) = struct.unpack_from("<I", self.buffer)
        if limit is not None and size > limit:
            raise ValueError(f"a message of {size} bytes")
        if len(self.buffer) < 4 + size:
            return None
        data = bytes(self.buffer[4 : 4 + size])
        del self.buffer[: 4 + size]
        return json.loads(data)

    def receive(self) -> Any:
        """The next message, waited for; None at the end."""
        while True:
            if (message := self.pop()) is not None:
                return message
            if self.is_closed:
                return None
            self.fill()

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        view = memoryview(struct.pack("<I", len(data)) + data)
        while view:
            view = view[os.write(self.write_fd, view) :]

    def close(self) -> None:
        for fd in {self.read_fd, self.write_fd}:
            os.close(fd)


def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> bool:
    """False where the system has no such call."""
    try:
        return bool(_libc().prctl(option, value, 0, 0, 0) == 0)
    except (AttributeError, OSError):
        return False


def enter_namespace() -> bool:
    """Put the processes forked from here on into a process-id namespace of their own, where the system lets us."""
    if not sys.platform.startswith("linux"):
        return False
    uid, gid = os.getuid(), os.getgid()
    try:
        libc = _libc()
        if uid == 0 and libc.unshare(CLONE_NEWPID) == 0:
            return True
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWPID) != 0:
            return False
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    except (AttributeError, OSError):
        return False
    return True


def keep(server: int, pool_pid: int, folder: str) -> None:
    """Wait for the server to end, or for the pool's process to be gone, which ends the server.

    A pool that is gone cannot remove its folder any more, so that is done here.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        pid, status = os.waitpid(server, os.WNOHANG)
        if os.getppid() != pool_pid:
            if not pid:
                os.kill(server, signal.SIGKILL)
            remove(folder)
            os._exit(1)
        if pid:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        wait_for_child(0.5)


def wait_for_child(seconds: float) -> None:
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait({signal.SIGCHLD}, seconds)
    else:
        time.sleep(min(seconds, 0.05))


def descendants(pid: int) -> list[int]:
    """Every process under `pid`, from /proc; empty where there is none to read."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        try:
            threads = os.listdir(f"/proc/{parent}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                with open(f"/proc/{parent}/task/{thread}/children") as f:
                    children = [int(x) for x in f.read().split()]
            except OSError:
                continue
            found += children
            todo += children
    return found


class Server:
    def __init__(self, channel: Channel, judge: Any, limits: dict[str, Any], folder: str, has_namespace: bool) -> None:
        self.channel, self.judge, self.limits, self.folder = channel, judge, limits, folder
        self.has_namespace = has_namespace
        self.child: tuple[int, Channel] | None = None

    def serve(self) -> None:
        while (request := self.channel.receive()) is not None:
            self.channel.send({"id": request["id"], **self.answer(request["payload"])})
        self.sweep()

    def answer(self, payload: Any) -> dict[str, Any]:
        try:
            self.judge.prepare(payload)
            is_isolated = self.judge.isolates(payload)
        except Exception as e:
            return {"failed": f"the verifier could not be set up for this task: {type(e).__name__}: {str(e)[:300]}"}
        token = os.urandom(8).hex()
        if is_isolated:
            place = os.path.join(self.folder, token)  # not by process id: every namespace has the same ones
            os.mkdir(place)
            child = self.fork(payload, token, place)
            outcome = self.wait(child, token)
            self.sweep()
            child[1].close()
            remove(place)
            return outcome
        if self.child is None:
            self.child = self.fork(None, token, self.folder)
        try:
            self.child[1].send({"token": token, "payload": payload})
            outcome = self.wait(self.child, token)
        except BrokenPipeError:
            outcome = {"failed": self.describe_death(self.child[0])}
        if "result" not in outcome:
            self.sweep()
        return outcome

    def fork(self, payload: Any, token: str, place: str) -> tuple[int, Channel]:
        """A child that judges `payload` and ends, or, without one, judges what it is sent."""
        down, up = os.pipe(), os.pipe()
        pid = os.fork()
        if pid:
            os.close(down[0])
            os.close(up[1])
            return pid, Channel(up[0], down[1])
        leave = os._exit  # judged code may put something else in its place
        try:
            os.setsid()
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            self.channel.close()
            os.close(down[1])
            os.close(up[0])
            os.chdir(place)
            restrict(self.limits)
            channel = Channel(down[0], up[1])
            if payload is not None:
                channel.send(self.run(payload, token, is_hard=True))
            else:
                while (request := channel.receive()) is not None:
                    channel.send(self.run(request["payload"], request["token"], is_hard=False))
            leave(0)
        except BaseException:  # nothing may return into the server's stack from a child
            leave(70)
        raise AssertionError("a child never returns")

    def run(self, payload: Any, token: str, *, is_hard: bool) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(used.ru_utime + used.ru_stime + self.limits["cpu_s"])
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1 if is_hard else hard))
        try:
            result = self.judge.judge(payload)
        except MemoryError:
            gc.collect()
            result = {"status": "error", "reason": "the verdict needs more memory than it may have"}
        except BaseException as e:  # SystemExit and the like are the verdict's failure, not the worker's
            result = {"status": "error", "reason": f"the verifier raised {type(e).__name__}: {str(e)[:300]}"}
        reason, key = result.get("reason") or "", result.get("key")
        cut = {"reason": str(reason)[:500], "key": None if key is None else str(key)[:4000]}
        return {"token": token, "result": {"status": result["status"], "score": result.get("score"), **cut}}

    def wait(self, child: tuple[int, Channel], token: str) -> dict[str, Any]:
        """The child's result, or why there is none. Ends with the child killed unless it answered."""
        pid, channel = child
        deadline = time.monotonic() + self.limits["time_s"]
        poll = select.poll()
        poll.register(channel.read_fd, select.POLLIN)
        if not self.channel.is_closed:
            poll.register(self.channel.read_fd, select.POLLIN)
        ticks = 0
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                self.kill(pid)
                return {"timeout": True}
            ready = dict(poll.poll(max(1, min(20, left * 1000))))
            if self.channel.read_fd in ready:
                self.channel.fill()
                if self.channel.is_closed:  # the pool is gone
                    self.sweep()
                    os._exit(1)
            if channel.read_fd in ready:
                channel.fill()
                try:
                    message = channel.pop(MAX_REPLY_BYTES)
                except (ValueError, RecursionError):
                    self.kill(pid)
                    return {"failed": "what came back is no verdict"}
                if message is not None:
                    if type(message) is dict and message.get("token") == token and "result" in message:
                        return {"result": message["result"]}
                    self.kill(pid)
                    return {"failed": "what came back is no verdict of this request"}
                if channel.is_closed:
                    return {**self.describe_death(pid)}
            elif not ready:
                if has_ended(pid):
                    return {**self.describe_death(pid)}
                ticks += 1
                if len(descendants(os.getpid() if not self.has_namespace else own_pid())) > self.limits["processes"]:
                    self.kill(pid)
                    return {"failed": f"it started more than {self.limits['processes']} processes"}

    def describe_death(self, pid: int) -> dict[str, Any]:
        """Reap the child. Killed by a signal that nobody here sent is the machine's doing, not the payload's."""
        try:
            os.kill(pid, signal.SIGKILL) if not has_ended(pid, grace_s=0.2) else None
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:
            return {"died": "the process ended before its verdict"}
        if status == -signal.SIGXCPU:
            return {"failed": "it used more processor time than it may have"}
        if status == -signal.SIGXFSZ:
            return {"failed": "it wrote a larger file than it may"}
        if status == -signal.SIGKILL:
            return {"died": "the process was killed before its verdict (out of memory?)"}
        if status < 0:
            return {"failed": f"the process died of {signal.Signals(-status).name} before its verdict"}
        return {"failed": f"the process ended with status {status} before its verdict"}

    def kill(self, pid: int) -> None:
        for send in (os.killpg, os.kill):
            try:
                send(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue

    def sweep(self) -> None:
        """Kill and reap everything below this process."""
        if self.child is not None:
            self.kill(self.child[0])
            self.child[1].close()
            self.child = None
        for _ in range(200):
            if self.has_namespace:
                with contextlib.suppress(ProcessLookupError):  # all of the namespace but this, its first process
                    os.kill(-1, signal.SIGKILL)
            else:
                for pid in descendants(os.getpid()):
                    self.kill(pid)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.002)


def own_pid() -> int:
    """This process's id as /proc has it, which is the outer one inside a namespace."""
    return int(os.readlink("/proc/self"))


def has_ended(pid: int, grace_s: float = 0.0) -> bool:
    """True once the child has ended; it stays to be reaped."""
    end = time.monotonic() + grace_s
    while True:
        try:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
        except ChildProcessError:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.005)


def remove(folder: str) -> None:
    try:
        os.rmdir(folder)
    except OSError:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def restrict(limits: dict[str, Any]) -> None:
    """Limits of a child. Memory counts from what the server has loaded, which the child shares."""
    try:
        with open("/proc/self/statm") as f:
            loaded = int(f.read().split()[0]) * resource.getpagesize()
    except OSError:
        loaded = 0
    wanted = {
        "RLIMIT_AS": loaded + limits["memory_bytes"],
        "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):  # macOS has no RLIMIT_AS
            continue


def load_judges(folder: str) -> Any:
    spec = importlib.util.spec_from_file_location(
        "tutelage_judges", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tutelage_judges"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Move the protocol off 0 and 1, so that nothing judged code prints reaches it; then serve until the end."""
    channel = Channel(os.dup(0), os.dup(1))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    setup = channel.receive()
    if setup is None:
        return
    pool_pid = os.getppid()
    has_namespace = bool(setup["namespace"]) and enter_namespace()
    server = os.fork()
    if server:
        channel.close()
        keep(server, pool_pid, setup["folder"])
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not has_namespace:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    sys.path.extend(p for p in setup["sys_path"] if p not in sys.path)
    try:
        judge = load_judges(setup["judges"]).build(setup["kind"], setup["options"])
    except BaseException as e:  # a user's module may raise anything on import
        channel.send({"ready": False, "reason": f"{type(e).__name__}: {str(e)[:500]}"})
        return
    gc.collect()
    gc.freeze()  # forked children share these pages
    channel.send({"ready": True, "namespace": has_namespace})
    Server(channel, judge, setup["limits"], setup["folder"], has_namespace).serve()


if __name__ == "__main__":
    main()
