"""What judged code may do to a worker, and that it costs one verdict."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tutelage.errors import ConfigError, VerifierError
from tutelage.types import Status, Task, Trajectory
from tutelage.verifiers import PythonVerifier, WorkerPool
from tutelage.verifiers import pool as pool_module
from tutelage.verifiers.pool import Limits

HOSTILE = """
import ctypes, gc, json, os, re, resource, signal, struct, subprocess, sys, threading, time

class AlwaysEqual:
    __class__ = bool
    def __eq__(self, other): return True
    def __hash__(self): return hash(True)
    def __bool__(self): return True

class BadError(Exception):
    def __str__(self): os._exit(3)

def deep(n): return deep(n + 1) + 1

def raise_(e): raise e

def swallow():
    while True:
        try: time.sleep(10)
        except BaseException: pass

def ignore_signals():
    for s in range(1, 32):
        try: signal.signal(s, signal.SIG_IGN)
        except OSError: pass
    time.sleep(30)

def flood(fd, n):
    for _ in range(n): os.write(fd, b"x" * 1000000)
    return True

def forge():
    data = json.dumps({"id": 0, "token": "x", "result": {"status": "accept", "score": 1.0, "reason": "", "key": None}})
    frame = struct.pack("<I", len(data)) + data.encode()
    for fd in range(64):
        try: os.write(fd, frame)
        except OSError: pass
    return False

def garbage(data):
    for fd in range(3, 64):
        try: os.write(fd, data)
        except OSError: pass
    return False

def patch():
    for name, module in list(sys.modules.items()):
        if name.startswith("tutelage_judges"):
            for key in ("read_answer", "error", "reject"):
                if hasattr(module, key): setattr(module, key, lambda *a: {"status": "accept", "score": 1.0})
    json.dumps = lambda *a, **k: "{}"
    os._exit = lambda code: None
    sys.modules["tests_state"] = 1
    open("left_behind", "w").write("x")
    return False

def is_clean(): return "tests_state" not in sys.modules and not os.listdir(".") and json.dumps(1) == "1"

def wait_for_beat(path):
    while not (os.path.exists(path) and os.path.getsize(path)): time.sleep(0.005)
    return True

def heartbeat(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                open(path, "a").write("x"); time.sleep(0.005)
        os._exit(0)
    return wait_for_beat(path)

def popen(path):
    code = "import sys,time\\nwhile 1: open(sys.argv[1],'a').write('x'); time.sleep(0.005)"
    subprocess.Popen([sys.executable, "-c", code, path], start_new_session=True)
    return wait_for_beat(path)

def fork_bomb():
    while True:
        try: os.fork()
        except OSError: pass

def thread_left():
    threading.Thread(target=time.sleep, args=(30,)).start()
    return True

def big_file():
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with open("big", "wb") as f:
        for _ in range(100): f.write(b"x" * 1000000)
    return True

def burn():
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    while True: pass

def secrets(): return any("SECRET" in k for k in os.environ)

ATTACKS = {
    "good": lambda d: True, "bad": lambda d: False, "half": lambda d: 0.5, "one": lambda d: 1, "zero": lambda d: -0.0,
    "dict": lambda d: {"accepted": True, "score": 0.5, "reason": "fine", "key": "k"},
    "status": lambda d: {"status": "error", "reason": "no judge"}, "score": lambda d: {"score": 1.0},
    "none": lambda d: None, "two": lambda d: 2.0, "nan": lambda d: float("nan"), "inf": lambda d: float("inf"),
    "minus": lambda d: -1, "huge": lambda d: 10 ** 400, "longer": lambda d: 10 ** 5000, "text": lambda d: "accept",
    "equal": lambda d: AlwaysEqual(), "list": lambda d: [True], "empty": lambda d: {},
    "both": lambda d: {"accepted": True, "status": "reject"}, "keys": lambda d: {"accept": True},
    "accepted": lambda d: {"accepted": AlwaysEqual()}, "scored": lambda d: {"accepted": True, "score": float("nan")},
    "reasoned": lambda d: {"accepted": True, "reason": AlwaysEqual()}, "statused": lambda d: {"status": AlwaysEqual()},
    "surrogate": lambda d: {"accepted": True, "reason": "a\\ud800\\x00b", "key": "\\udfff"},
    "long": lambda d: {"accepted": True, "reason": "r" * 10 ** 6, "key": "k" * 10 ** 6},
    "raise": lambda d: raise_(ValueError("oh\\nno")), "base": lambda d: raise_(BaseException("x")),
    "exit": lambda d: sys.exit(0), "interrupt": lambda d: raise_(KeyboardInterrupt()),
    "str": lambda d: raise_(BadError()),
    "stop": lambda d: raise_(StopIteration()), "generator": lambda d: raise_(GeneratorExit()),
    "_exit0": lambda d: os._exit(0), "_exit7": lambda d: os._exit(7), "abort": lambda d: os.abort(),
    "segfault": lambda d: ctypes.string_at(0), "kill": lambda d: os.kill(os.getpid(), 9), "deep": lambda d: deep(0),
    "memory": lambda d: len(bytearray(10 ** 10)) > 0, "grow": lambda d: [bytearray(10 ** 7) for _ in range(1000)],
    "loop": lambda d: sum(iter(int, 1)), "swallow": lambda d: swallow(), "ignore": lambda d: ignore_signals(),
    "pow": lambda d: 9 ** 9 ** 9 > 0, "regex": lambda d: re.match("(a+)+$", "a" * 50 + "b"),
    "stdout": lambda d: flood(1, 50), "stderr": lambda d: flood(2, 50), "print": lambda d: print("x" * 10 ** 6) or True,
    "stdin": lambda d: sys.stdin.read() == "", "input": lambda d: input(),
    "forge": lambda d: forge(), "garbage": lambda d: garbage(b"\\xff" * 5000), "nest": lambda d: garbage(
        struct.pack("<I", 200000) + b"[" * 200000), "patch": lambda d: patch(), "clean": lambda d: is_clean(),
    "daemon": lambda d: heartbeat(d["path"]), "popen": lambda d: popen(d["path"]), "bomb": lambda d: fork_bomb(),
    "thread": lambda d: thread_left(), "file": lambda d: big_file(), "burn": lambda d: burn(),
    "parent": lambda d: os.kill(os.getppid(), 9) or time.sleep(0.2) or True, "secrets": lambda d: secrets(),
    "sleep": lambda d: time.sleep(d["sleep"]) or True,
    "nap": lambda d: time.sleep(30) or True,
    "once": lambda d: os.path.exists(d["path"]) or open(d["path"], "w").close() or time.sleep(30),
    "cwd": lambda d: os.getcwd() != d["cwd"],
}

def judge(task, completion, trajectory):
    return ATTACKS[completion](task["metadata"])
"""


def said(completion, **fields):
    return Trajectory(id="x", task_id="t", task_hash="h", spans=(), completion=completion, **fields)


def task(**metadata):
    return Task(id="t", messages=({"role": "user", "content": "?"},), metadata=metadata)


def verifier(root, *, use_namespace=True, function="hostile.py:judge", **settings):
    (root / "hostile.py").write_text(HOSTILE)
    limits = {"time_s": 3.0, "memory_bytes": 300_000_000, "file_bytes": 1_000_000, "processes": 20, "cpu_s": 30.0}
    v = PythonVerifier(
        function=function, root=root, **{"workers": 1, **settings, "limits": {**limits, **settings.get("limits", {})}}
    )
    v.pool.use_namespace = use_namespace
    return v


@pytest.fixture(scope="module", params=["namespace", "no namespace"])
def hostile(request, tmp_path_factory):
    with verifier(tmp_path_factory.mktemp("project"), use_namespace=request.param == "namespace") as v:
        yield v


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


ERRORS = {
    "none": "returned None; it must return a bool",
    "two": "must be in [0, 1], got 2.0",
    "nan": "must be in [0, 1], got nan",
    "inf": "must be in [0, 1], got inf",
    "minus": "must be in [0, 1], got -1",
    "huge": "must be in [0, 1], got 1000",
    "longer": "raised ValueError",  # Python itself will not write a number so long
    "text": "returned 'accept'",
    "equal": "returned a AlwaysEqual",
    "list": "returned a list",
    "empty": "none of accepted, status, score",
    "both": "both accepted and status",
    "keys": "unknown keys ['accept']",
    "accepted": "accepted must be a bool, got a AlwaysEqual",
    "scored": "must be in [0, 1], got nan",
    "reasoned": "reason must be a str, got a AlwaysEqual",
    "statused": "status must be accept, reject or error, got a AlwaysEqual",
    "status": "no judge",
    "raise": "raised ValueError: oh (hostile.py:",
    "base": "raised BaseException: x",
    "exit": "raised SystemExit: 0",
    "interrupt": "raised KeyboardInterrupt",
    "stop": "raised StopIteration",
    "generator": "raised GeneratorExit",
    "str": "ended with status 3 before its verdict",
    "_exit0": "ended with status 0 before its verdict",
    "_exit7": "ended with status 7 before its verdict",
    "abort": "died of SIGABRT",
    "segfault": "died of SIGSEGV",
    "kill": "was killed before its verdict",
    "deep": "raised RecursionError",
    "memory": "more memory than it may have",
    "grow": "more memory than it may have",
    "input": "raised EOFError",
    "forge": "no verdict of this request",
    "garbage": "what came back is no verdict",
    "nest": "what came back is no verdict",
    "bomb": "more than 20 processes",
    "file": "larger file than it may",
    "unknown": "raised KeyError: 'unknown'",
}
VALUES = {
    "good": (Status.ACCEPT, 1.0),
    "bad": (Status.REJECT, 0.0),
    "half": (Status.REJECT, 0.5),
    "one": (Status.ACCEPT, 1.0),
    "zero": (Status.REJECT, 0.0),
    "dict": (Status.ACCEPT, 0.5),
    "score": (Status.ACCEPT, 1.0),
    "stdout": (Status.ACCEPT, 1.0),
    "stderr": (Status.ACCEPT, 1.0),
    "print": (Status.ACCEPT, 1.0),
    "stdin": (Status.ACCEPT, 1.0),
    "thread": (Status.ACCEPT, 1.0),
    "long": (Status.ACCEPT, 1.0),
    "clean": (Status.ACCEPT, 1.0),
    "secrets": (Status.REJECT, 0.0),
    "surrogate": (Status.ACCEPT, 1.0),
}
HANGS = ["loop", "swallow", "ignore", "pow", "regex", "nap"]


def test_each_attack_costs_its_own_verdict(hostile):
    names = [*VALUES, *ERRORS]
    batch = [said(x) for name in names for x in (name, "clean")]
    start = time.monotonic()
    verdicts = hostile.judge(task(), batch)
    assert time.monotonic() - start < 20
    assert len(verdicts) == len(batch)
    assert [v.status for v in verdicts[1::2]] == [Status.ACCEPT] * len(names)
    by_name = dict(zip(names, verdicts[0::2], strict=True))
    assert {n: (v.status, v.score) for n, v in by_name.items() if n in VALUES} == VALUES
    errors = {n: v for n, v in by_name.items() if n in ERRORS}
    assert {n for n, v in errors.items() if v.status is not Status.ERROR or v.score is not None} == set()
    assert {n: v.reason for n, v in errors.items() if ERRORS[n] not in v.reason} == {}
    assert all(len(v.reason) <= 500 for v in verdicts)
    by_name["surrogate"].reason.encode()
    assert by_name["surrogate"].key == "\\udfff"
    assert by_name["dict"].key == "k" and by_name["dict"].reason == "fine"
    assert str(by_name["zero"].score) == "0.0"


@pytest.mark.parametrize("use_namespace", [True, False])
def test_whatever_hangs_ends_at_the_time_limit(tmp_path, use_namespace):
    with verifier(tmp_path, use_namespace=use_namespace, limits={"time_s": 0.3}) as v:
        start = time.monotonic()
        verdicts = v.judge(task(), [said(x) for name in HANGS for x in (name, "good")])
        took = time.monotonic() - start
    assert [v.reason for v in verdicts[0::2]] == ["no verdict within 0.3 s"] * len(HANGS)
    assert [v.status for v in verdicts] == [Status.ERROR, Status.ACCEPT] * len(HANGS)
    assert 0.3 * len(HANGS) <= took < 0.3 * len(HANGS) + 4


def test_a_patched_checker_is_patched_for_one_verdict(hostile):
    verdicts = hostile.judge(task(), [said(x) for x in ("patch", "clean", "bad", "none", "clean")])
    assert [v.status for v in verdicts[1:]] == [Status.ACCEPT, Status.REJECT, Status.ERROR, Status.ACCEPT]


@pytest.mark.parametrize("attack", ["daemon", "popen"])
def test_nothing_outlives_its_verdict(hostile, tmp_path, attack):
    beat = tmp_path / "beat"
    (verdict,) = hostile.judge(task(path=str(beat)), [said(attack)])
    assert verdict.is_accepted
    size = beat.stat().st_size
    time.sleep(0.1)
    assert beat.stat().st_size == size > 0


def test_processor_time_is_limited_too(tmp_path):
    with verifier(tmp_path, limits={"time_s": 10.0, "cpu_s": 0.1}) as v:
        start = time.monotonic()
        burn, good = v.judge(task(), [said("burn"), said("good")])
        assert time.monotonic() - start < 8
    assert burn.reason == "it used more processor time than it may have"
    assert good.is_accepted


@pytest.mark.parametrize("use_namespace", [True, False])
def test_killing_the_parent_process_costs_at_most_the_verdict(tmp_path, use_namespace):
    with verifier(tmp_path, use_namespace=use_namespace, retries=0) as v:
        verdicts = v.judge(task(), [said(x) for x in ("good", "parent", "good", "good")])
    assert [x.is_accepted for x in (verdicts[0], *verdicts[2:])] == [True] * 3
    assert verdicts[1].status in (Status.ERROR, Status.ACCEPT)


def test_a_worker_killed_from_outside_is_an_error_and_with_retries_a_second_try(tmp_path):
    for retries, expected in [(0, Status.ERROR), (1, Status.ACCEPT)]:
        flag = tmp_path / f"flag{retries}"
        with verifier(tmp_path, retries=retries, limits={"time_s": 20.0}) as v:
            assert v.judge(task(), [said("good")])[0].is_accepted

            def kill(v=v, flag=flag):
                wait_for(flag.exists)
                os.kill(v.pool.pids()[0], signal.SIGKILL)

            killer = threading.Thread(target=kill)
            killer.start()
            verdicts = v.judge(task(path=str(flag)), [said("once"), said("good")])
            killer.join()
        assert verdicts[0].status is expected
        assert verdicts[1].is_accepted
        assert retries or "killed" in verdicts[0].reason


def test_a_worker_killed_while_idle_costs_nothing(tmp_path):
    with verifier(tmp_path, retries=0) as v:
        v.judge(task(), [said("good")])
        (pid,) = v.pool.pids()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: is_gone(pid))
        assert [x.is_accepted for x in v.judge(task(), [said("good")] * 3)] == [True] * 3
        assert v.pool.pids() != [pid]


def test_a_worker_that_stops_answering_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "_GRACE_S", 0.3)
    with verifier(tmp_path, limits={"time_s": 0.3}) as v:
        v.judge(task(), [said("good")])
        for pid in [*v.pool.pids(), *pool_module._descendants(v.pool.pids()[0])]:
            os.kill(pid, signal.SIGSTOP)
        verdicts = v.judge(task(), [said("good")] * 3)
    assert [x.status for x in verdicts] == [Status.ERROR, Status.ACCEPT, Status.ACCEPT]
    assert "did not answer" in verdicts[0].reason


def test_verdicts_come_in_order_whoever_gives_them(tmp_path):
    with verifier(tmp_path, workers=3, retries=0, limits={"time_s": 10.0}) as v:
        groups = [(task(sleep=0.08 if i % 3 == 0 else 0.0), [said("sleep"), said("bad")]) for i in range(9)]
        verdicts = v.judge_many(groups)
    assert [[x.is_accepted for x in row] for row in verdicts] == [[True, False]] * 9
    assert v.judge_many([(task(), [])]) == [[]]
    assert v.judge_many([]) == []


def test_without_isolation_one_process_serves_many_and_is_replaced_when_it_dies(tmp_path):
    with verifier(tmp_path, isolate=False, limits={"time_s": 0.3}) as v:
        names = ["good", "_exit0", "good", "nap", "good", "kill", "good", "stdout", "forge", "good"]
        verdicts = v.judge(task(), list(map(said, names)))
    assert [x.is_accepted for x in verdicts] == [n in ("good", "stdout") for n in names]
    assert [x.status is Status.ERROR for x in verdicts] == [n not in ("good", "stdout") for n in names]


def test_threads_share_a_verifier(tmp_path):
    results = {}
    with verifier(tmp_path, workers=2, retries=0) as v:

        def work(i):
            results[i] = [x.status for x in v.judge(task(), [said("good"), said("bad"), said("_exit0")])]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        # Workers outlive the thread that started them.
        assert v.judge(task(), [said("good")])[0].is_accepted
    assert results == {i: [Status.ACCEPT, Status.REJECT, Status.ERROR] for i in range(4)}


def test_a_verifier_can_be_pickled_and_forked(tmp_path):
    with verifier(tmp_path) as v:
        v.judge(task(), [said("good")])
        parents = v.pool.pids()
        with pickle.loads(pickle.dumps(v)) as copy:
            assert copy.pool.pids() == []
            assert copy.judge(task(), [said("good")])[0].is_accepted
            assert copy.version == v.version
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                has_none = v.pool.pids() == []
                is_judged = v.judge(task(), [said("good")])[0].is_accepted
                code = 0 if has_none and is_judged and v.pool.pids() and v.pool.pids() != parents else 2
                v.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert v.judge(task(), [said("good")])[0].is_accepted
        assert v.pool.pids() == parents


def test_closing_leaves_no_process_no_descriptor_and_no_folder(tmp_path):
    before = sorted(os.listdir("/proc/self/fd"))
    v = verifier(tmp_path, workers=2, limits={"time_s": 0.3})
    v.judge(task(), [said("good"), said("nap"), said("_exit0")])
    pids = [p for w in v.pool.pids() for p in (w, *pool_module._descendants(w))]
    (folder,) = v.pool._folders
    assert len(pids) >= 4 and not any(map(is_gone, pids))
    v.close()
    v.close()
    assert all(map(is_gone, pids))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not Path(folder).exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # not even as zombies
    assert v.judge(task(), [said("good")])[0].is_accepted  # starts again
    v.close()


def test_a_pool_that_is_let_go_ends_its_workers(tmp_path):
    v = verifier(tmp_path)
    v.judge(task(), [said("good")])
    pids = v.pool.pids()
    del v
    wait_for(lambda: all(map(is_gone, pids)))


@pytest.mark.parametrize("use_namespace", [True, False])
def test_workers_die_with_the_process_that_has_them(tmp_path, use_namespace):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    (tmp_path / "main.py").write_text(
        f"""
import os, threading, time
from tutelage.verifiers import PythonVerifier
from tutelage.types import Task, Trajectory
v = PythonVerifier(function="hostile.py:judge", workers=1, limits={{"time_s": 60.0}})
v.pool.use_namespace = {use_namespace}
t = Task(id="t", messages=())
said = lambda c: Trajectory(id="x", task_id="t", task_hash="h", spans=(), completion=c)
v.judge(t, [said("good")])
threading.Thread(target=v.judge, args=(t, [said("nap")]), daemon=True).start()
time.sleep(0.3)
holder = os.fork()  # keeps copies of the pipes, so that their ends are never seen
if holder:
    print(*v.pool.pids(), holder, *v.pool._folders, flush=True)
time.sleep(30)
"""
    )
    main = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    *numbers, folder = main.stdout.readline().split()
    worker, holder = map(int, numbers)
    pids = [worker, *pool_module._descendants(worker)]
    assert len(pids) == 3
    main.kill()
    main.wait()
    main.stdout.close()
    try:
        wait_for(lambda: all(map(is_gone, pids)))
        wait_for(lambda: not Path(folder).exists())
    finally:
        os.kill(holder, signal.SIGKILL)


def test_environment_has_no_secrets_but_what_is_passed(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "x")
    for names in ((), ("MY_SECRET",)):
        with verifier(tmp_path, pass_env=names) as v:
            assert v.judge(task(), [said("secrets")])[0].is_accepted is bool(names)


def test_working_folder_is_not_the_callers(tmp_path):
    with verifier(tmp_path) as v:
        assert v.judge(task(cwd=os.getcwd()), [said("cwd")])[0].is_accepted


def test_a_verifier_that_cannot_be_loaded_is_an_error_of_setup(tmp_path):
    for code, reason in [
        ("raise RuntimeError('no model here')\ndef judge(*a): return True", "RuntimeError: no model here"),
        ("import sys\nsys.exit(4)\ndef judge(*a): return True", "SystemExit: 4"),
        ("judge = 3", "has no function 'judge'"),
    ]:
        (tmp_path / "broken.py").write_text(code)
        with (
            PythonVerifier(function="broken.py:judge", root=tmp_path, workers=2) as v,
            pytest.raises(VerifierError, match=reason),
        ):
            v.judge(task(), [said("x")])
        assert v.pool.pids() == []
    (tmp_path / "broken.py").write_text("import os\nos._exit(9)\ndef judge(*a): return True")
    with (
        PythonVerifier(function="broken.py:judge", root=tmp_path, workers=1) as v,
        pytest.raises(VerifierError, match="before it was ready, three times"),
    ):
        v.judge(task(), [said("x")])
    (tmp_path / "broken.py").write_text("import time\ntime.sleep(60)\ndef judge(*a): return True")
    with (
        PythonVerifier(function="broken.py:judge", root=tmp_path, workers=1, limits={"start_s": 0.3}) as v,
        pytest.raises(VerifierError, match=r"not ready after 0\.3 s"),
    ):
        v.judge(task(), [said("x")])


def test_a_task_that_is_no_json_is_an_error_verdict(tmp_path):
    with verifier(tmp_path) as v:
        got = v.judge_many([(task(x={1, 2}), [said("good")]), (task(), [said("good")])])
    assert got[0][0].status is Status.ERROR and "cannot be sent" in got[0][0].reason
    assert got[1][0].is_accepted


def test_large_texts_pass(tmp_path):
    (tmp_path / "size.py").write_text("def judge(task, completion, trajectory): return len(completion) == 3_000_000")
    with PythonVerifier(function="size.py:judge", root=tmp_path, workers=2) as v:
        assert all(x.is_accepted for x in v.judge(task(), [said("x" * 3_000_000)] * 6))


def test_wrong_pool_settings_are_named():
    with pytest.raises(ConfigError, match="workers >= 1"):
        WorkerPool("exact", workers=0)
    with pytest.raises(ConfigError, match="retries >= 0"):
        WorkerPool("exact", retries=-1)
    with pytest.raises(ConfigError, match="time_s must be positive, got -1") as e:
        Limits(time_s=-1, processes=0)
    assert len(e.value.problems) == 2
