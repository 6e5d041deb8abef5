"""Two processes against one, holding whole weights or parts of them (FSDP2 over gloo): the same steps for every signal,
with the teacher in process, in a cache and behind a server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
import process_cases
from model_server import ModelServer
from process_cases import CASES, run_case
from test_two_processes import launched

from tutelage.data.logit_cache import write_logit_cache
from tutelage.policies.teachers import InProcessTeacher
from tutelage.testing.tiny import tiny_model
from tutelage.train.distributed import Processes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    with ModelServer(tiny_model(seed=1), str) as found:
        yield found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    rows = [t for g in process_cases.draw().groups for t in g.trajectories]
    write_logit_cache(folder, rows, InProcessTeacher(tiny_model(seed=1)), vocab_size=259, tokenizer="", k=8)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, server: ModelServer, cache: Path) -> Path:
    """What two processes made of every case."""
    out = tmp_path_factory.mktemp("together")
    command = [sys.executable, *launched(2, "torchrun"), process_cases.__file__, str(out), str(cache), server.url]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.timeout(700)
@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_steps_of_one(
    together: Path, server: ModelServer, cache: Path, name: str, is_sharded: bool
) -> None:
    stem = together / f"{list(CASES).index(name)}-{is_sharded}"
    got: dict[str, Any] = json.loads(stem.with_suffix(".json").read_text()) | torch.load(stem.with_suffix(".pt"))
    want = run_case(name, Processes(), cache, server.url)
    dtype = CASES[name].get("dtype", torch.float32)
    rtol = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(got["steps"], want["steps"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=rtol, abs=1e-2 if dtype == torch.bfloat16 else 1e-6), key
    assert want["steps"][0]["train/grad_norm"] > 2 * process_cases.CUT_STEP  # the clip by the global norm is at work
    assert [len(s) for s in got["scores"]] == [len(s) for s in want["scores"]]
    for a, b in zip(got["scores"], want["scores"], strict=True):
        assert a == pytest.approx(b, rel=10 * rtol)
    start = dict(process_cases.made(Processes(), is_sharded=False, dtype=dtype, lora="lora" in CASES[name], kind="sgd")
                 .optimizer.weights())  # fmt: skip
    for kind in ("weights", "moments"):
        assert got[kind].keys() == want[kind].keys()
    for name_, value in want["weights"].items():
        assert got["weights"][name_].dtype == value.dtype
        moved = float((value - start[name_]).norm())
        assert moved > 0
        if CASES[name].get("kind") != "adamw":  # which turns rounding of a gradient near 0 into a whole step
            assert float((got["weights"][name_] - value).norm()) <= 5 * rtol * moved + 1e-7
    for name_, value in want["moments"].items():
        torch.testing.assert_close(got["moments"][name_], value, rtol=1e-4, atol=1e-7)
