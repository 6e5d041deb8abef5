"""Start a vLLM server from its own environment's interpreter, and make sure that it never outlives this process."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tutelage.errors import MissingExtra, SamplerError
from tutelage.policies.http import HttpClient, RetryPolicy

PYTHON_ENV = "TUTELAGE_VLLM_PYTHON"
PLUGIN = Path(__file__).parent / "vllm_worker"
"""Goes on the server's module path; holds `tutelage_vllm_worker.py`."""

# Runs the server in a process group of its own and ends the group when the process that asked for it is gone. It
# watches its parent's id: no signal, no thread and no open pipe of the parent is needed for that.
_GUARD = """
import os, signal, subprocess, sys, time
parent, command = int(sys.argv[1]), sys.argv[2:]
signal.signal(signal.SIGTERM, lambda *_: None)
child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
while child.poll() is None and os.getppid() == parent:
    time.sleep(0.25)
if child.poll() is None:
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        pass
code = child.poll()
os.killpg(0, signal.SIGTERM if os.getppid() == parent else signal.SIGKILL)
sys.exit(1 if code is None else code & 255)
"""


def vllm_python() -> Path:
    """The interpreter that has vLLM: $TUTELAGE_VLLM_PYTHON, else `.vllm-venv/bin/python` here.

    Raises:
        MissingExtra: there is none; the message has the command that makes it.
    """
    named = os.environ.get(PYTHON_ENV)
    path = Path(named) if named else Path(".vllm-venv/bin/python")
    if not path.exists():
        raise MissingExtra(
            f"vLLM runs in its own environment, and {path.absolute()} does not exist: make it with "
            f"`tools/vllm_env.sh` (`make vllm-env`), or name an interpreter that has vLLM in ${PYTHON_ENV}"
        )
    return path.absolute()


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class ServerProcess:
    """A server of ours: can be started, restarted and stopped, with everything it started.

    Args:
        command: what to run; it must answer `GET /health` on `port`.
        log: file that its output is appended to.
        start_s: longest time until it answers.
    """

    def __init__(
        self, command: Sequence[str], *, port: int, env: Mapping[str, str], log: Path, start_s: float = 300.0
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.num_starts = 0
        self._command, self._env, self._start_s = list(command), dict(env), start_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it is healthy.

        Raises:
            SamplerError: it ended, or was not healthy in time; the message has the end of its log.
        """
        self.num_starts += 1
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        client = HttpClient(self.url, timeout_s=5, retry=RetryPolicy(attempts=1))
        deadline = time.monotonic() + self._start_s
        while True:
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                self.stop()
                why = f"ended with code {code}" if code is not None else f"was not healthy within {self._start_s:.0f} s"
                raise SamplerError(f"the server at {self.url} {why}. The end of its log ({self.log}):\n{self._tail()}")
            try:
                client.get("/health")
                client.close()
                return
            except SamplerError:
                time.sleep(0.25)

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        """End the whole process group: asked first, after ten seconds forced."""
        if self._process is None:
            return
        group = self._process.pid
        _signal_group(group, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while _group_exists(group) and time.monotonic() < deadline:
            self._process.poll()
            time.sleep(0.05)
        _signal_group(group, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _tail(self, size: int = 3000) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-size:]


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def vllm_process(
    model: str | Path,
    *,
    python: str | Path | None = None,
    dtype: str = "bfloat16",
    max_model_len: int | None = None,
    max_logprobs: int = 64,
    port: int | None = None,
    is_eager: bool | None = None,
    cpu_threads: int | None = None,
    cpu_cache_gb: int = 4,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    start_s: float = 300.0,
) -> ServerProcess:
    """A vLLM server set up as this library needs it, not yet started.

    The settings that matter: log-probabilities of the distribution that was sampled (`processed_logprobs`), nothing
    from the model's `generation_config`, the routes that take new weights (development mode, loopback only), and the
    worker extension that loads them. Without a GPU prompts are read whole: vLLM's engine dies of a seeded request
    whose prompt is read in parts ("CPU Generator does not use offset", 0.32).

    Args:
        model: folder, or `org/name`.
        max_logprobs: largest k of `VLLMScorer.top_k`.
        is_eager: neither compile the model nor record graphs; None does so where this process sees no CUDA device.
        cpu_threads, cpu_cache_gb: for a CPU build: threads, and memory for keys and values.
        args, env: added to the command line and the environment.
        log: file for the server's output; by default one in the temporary folder.
    """
    port = port or free_port()
    python = Path(python).absolute() if python else vllm_python()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-logprobs", str(max_logprobs)]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    import torch

    is_cpu = not torch.cuda.is_available()
    is_eager = is_cpu if is_eager is None else is_eager
    command += ["--enforce-eager"] if is_eager else []
    if is_cpu:  # a prompt read in parts steps its seeded generator back by an offset, which CPU generators lack
        command += ["--no-enable-chunked-prefill"]
    command += ["--worker-extension-cls", "tutelage_vllm_worker.Extension"]
    if max_model_len:
        command += ["--max-model-len", str(max_model_len)]
    settings = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH")}
    settings |= {"PYTHONPATH": str(PLUGIN), "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": str(cpu_cache_gb), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if cpu_threads:
        settings["OMP_NUM_THREADS"] = str(cpu_threads)
    if Path(model).is_dir():
        settings["HF_HUB_OFFLINE"] = "1"
    log = log or Path(tempfile.gettempdir()) / f"tutelage-vllm-{os.getpid()}-{port}.log"
    return ServerProcess(
        [*command, *args], port=port, env={**settings, **(env or {})}, log=log.absolute(), start_s=start_s
    )
