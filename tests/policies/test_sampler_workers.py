"""Sampling in worker processes: the same answers, shared weights, and what happens when somebody dies."""

import contextlib
import glob
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tutelage.errors import ConfigError, SamplerError
from tutelage.policies.sampler import InProcessSampler
from tutelage.policies.sampling_workers import WorkerSampler, _ModelUnpickler, _SharedModel
from tutelage.types import Sampler, SampleRequest, SamplingParams

PARAMS = SamplingParams(max_new_tokens=12)


def tiny_model(seed=1):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def ask(count=5):
    return [SampleRequest(prompt_ids=tuple(range(3, 5 + r)), n=3, seed=r) for r in range(count)]


def in_process(model):
    return InProcessSampler(model, stop_ids=[2], decode=str)


def ids_of(answers):
    """Tokens only: the last digit of a log-probability depends on the rows beside it."""
    return [[c.token_ids for c in group] for group in answers]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def named_files(pid):
    """Files of shared weights that a process has made."""
    return {
        p for folder in ("/dev/shm", tempfile.gettempdir()) for p in glob.glob(f"{folder}/tutelage-weights-{pid}-*")
    }


def shared_by(pid):
    """Paths that a process has open to nameless weights."""
    paths = glob.glob(f"/proc/{pid}/fd/*")
    return {p.replace(str(pid), "self") for p in paths if "memfd:tutelage" in os.path.realpath(p)}


@pytest.fixture(scope="module")
def workers():
    with WorkerSampler(tiny_model(), stop_ids=[2], decode=str, num_workers=2) as sampler:
        yield sampler
        running, left = pids(sampler), shared_by(os.getpid())
        assert all(is_running(pid) for pid in running)
    assert not any(is_running(pid) for pid in running)
    assert shared_by(os.getpid()) == left - {sampler._shared.path} and not named_files(os.getpid())


def pids(sampler):
    return [w.process.pid for w in sampler._workers]


def test_workers_answer_as_one_process_does(workers):
    assert isinstance(workers, Sampler)
    answers = workers.sample(ask(), PARAMS)
    assert ids_of(answers) == ids_of(in_process(tiny_model()).sample(ask(), PARAMS))
    assert workers.sample(ask(), PARAMS) == answers
    assert workers.engine_name == "fused"
    assert workers.sample([], PARAMS) == []
    assert ids_of(workers.sample(ask(1), PARAMS)) == ids_of(answers[:1])


def test_requests_go_to_workers_by_index(workers):
    sent = []
    inner = workers._send
    workers._send = lambda w, message: sent.append((w, [r.seed for r in message[0]])) or inner(w, message)
    try:
        workers.sample(ask(), PARAMS)
    finally:
        del workers._send
    assert sent == [(0, [0, 2, 4]), (1, [1, 3])]


def test_loaded_weights_are_the_ones_that_answer(workers):
    new = tiny_model(seed=9)
    expected = ids_of(in_process(new).sample(ask(), PARAMS))
    before = ids_of(workers.sample(ask(), PARAMS))
    old_version = workers.version
    workers.load(new.state_dict(), "round-1")
    assert workers.version == "round-1" != old_version
    assert ids_of(workers.sample(ask(), PARAMS)) == expected != before
    one_element = {n: t.clone() for n, t in new.state_dict().items()}
    one_element["model.norm.weight"][3] = 4.0
    workers.load(one_element, "round-2")
    assert ids_of(workers.sample(ask(), PARAMS)) != expected
    workers.load({n: t for n, t in tiny_model().state_dict().items() if n != "lm_head.weight"}, "base")
    assert ids_of(workers.sample(ask(), PARAMS)) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(3)}), "of another shape: model.norm.weight"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_changes(workers, change, message):
    before = workers.sample(ask(), PARAMS)
    state = dict(tiny_model(seed=4).state_dict())
    change(state)
    with pytest.raises(SamplerError, match=message):
        workers.load(state, "bad")
    assert workers.version != "bad"
    assert workers.sample(ask(), PARAMS) == before


def test_errors_of_a_worker_keep_their_type_and_name_it(workers):
    with pytest.raises(ConfigError, match="temperature") as caught:
        workers.sample(ask(), SamplingParams(temperature=-1))
    assert "sampling worker" in caught.value.__notes__[0]
    with pytest.raises(SamplerError, match="vocabulary"):
        workers.sample([SampleRequest(prompt_ids=(99,), n=1, seed=0)], PARAMS)
    assert len(workers.sample(ask(), PARAMS)) == 5


def test_progress_counts_completions_of_all_workers(workers):
    class Counted:
        total, done = 0, 0

        def start(self, what, total, unit):
            self.total = total

        def advance(self, amount=1, **numbers):
            self.done += amount

        def finish(self):
            self.total = -self.total

    counted = Counted()
    workers.sample(ask(), PARAMS, progress=counted)
    assert (counted.total, counted.done) == (-15, 15)


def test_a_worker_that_dies_is_named_and_replaced(workers):
    expected = workers.sample(ask(), PARAMS)
    victim = pids(workers)[1]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(SamplerError, match=rf"worker 1 of 2 \(process {victim}\) died: signal SIGKILL"):
        workers.sample(ask(), PARAMS)
    assert workers.sample(ask(), PARAMS) == expected
    assert victim not in pids(workers)


def test_a_shared_model_is_a_copy_in_the_asked_dtype_over_one_file():
    model = tiny_model()
    expected = tiny_model()
    for parameter in expected.parameters():
        parameter.data = parameter.data.bfloat16()
    shared = _SharedModel(model, torch.bfloat16)
    try:
        data = torch.from_file(shared.path, shared=True, size=shared.size, dtype=torch.uint8)
        copy = _ModelUnpickler(io.BytesIO(shared.pickled), data).load()
        assert model.lm_head.weight.dtype is torch.float32
        assert copy.lm_head.weight is copy.model.embed_tokens.weight
        assert in_process(copy).sample(ask(), PARAMS) == in_process(expected).sample(ask(), PARAMS)
        shared.load(tiny_model(seed=9).state_dict())
        assert torch.equal(copy.lm_head.weight, tiny_model(seed=9).lm_head.weight.bfloat16())
    finally:
        shared.close()


def test_what_cannot_be_sent_is_an_error_at_once():
    with pytest.raises(SamplerError, match="`decode` that can be pickled"):
        WorkerSampler(tiny_model(), stop_ids=[2], decode=lambda ids: "", num_workers=1)
    with pytest.raises(ConfigError, match="at least 1"):
        WorkerSampler(tiny_model(), stop_ids=[2], decode=str, num_workers=0)


PARENT = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
import test_sampler_workers as t
sampler = t.WorkerSampler(t.tiny_model(), stop_ids=[2], decode=str, num_workers=1)
other = os.fork() if {forks} else 0
if {forks} and not other:
    time.sleep(60)
    os._exit(0)
print(*t.pids(sampler), other, flush=True)
sampler.sample([t.SampleRequest(prompt_ids=(3,), n=10**6, seed=0)], t.PARAMS)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("forks", [False, True], ids=["alone", "its fork lives on"])
def test_a_parent_that_is_killed_leaves_neither_workers_nor_weights(forks):
    code = PARENT.format(folder=os.path.dirname(__file__), forks=forks)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid, other = (int(x) for x in parent.stdout.readline().split())
    try:
        assert is_running(pid) and not named_files(parent.pid)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(pid) and not named_files(parent.pid)
    finally:
        parent.kill()
        parent.stdout.close()
        for left in {pid, other} - {0}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


def test_workers_outlive_the_thread_that_started_them():
    made = []
    thread = threading.Thread(
        target=lambda: made.append(WorkerSampler(tiny_model(), stop_ids=[2], decode=str, num_workers=1))
    )
    thread.start()
    thread.join()
    time.sleep(0.3)
    with made[0] as sampler:
        assert ids_of(sampler.sample(ask(), PARAMS)) == ids_of(in_process(tiny_model()).sample(ask(), PARAMS))


def test_without_nameless_memory_the_weights_lie_in_a_file_that_close_deletes(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with WorkerSampler(tiny_model(), stop_ids=[2], decode=str, num_workers=1) as sampler:
        assert named_files(os.getpid()) == {sampler._shared.path}
        assert ids_of(sampler.sample(ask(), PARAMS)) == ids_of(in_process(tiny_model()).sample(ask(), PARAMS))
    assert not named_files(os.getpid())
