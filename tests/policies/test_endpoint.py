"""Asking endpoints: retries, rate limits, keys, the journal, and what becomes of every request."""

import email.utils
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from vllm_fake_server import FakeVLLM

from tutelage.errors import ConfigError, MissingExtra, SamplerError
from tutelage.policies.endpoint import Answer, EndpointSampler, RequestJournal, retokenisation
from tutelage.policies.http import HttpClient, RateLimit, Refused, RetryPolicy, Unreachable, run_all
from tutelage.policies.vllm_launch import ServerProcess, free_port, vllm_process, vllm_python
from tutelage.types import SamplingParams, Task

FAST = RetryPolicy(attempts=3, first_wait_s=0.001)
PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=32)


@pytest.fixture
def fake():
    with FakeVLLM() as server:
        yield server


def tasks(num):
    return [Task(id=f"t{i}", messages=({"role": "user", "content": f"question {i}"},)) for i in range(num)]


def endpoint(fake, **options):
    return EndpointSampler(f"{fake.url}/v1", "fake", **{"retry": FAST, "workers": 3, **options})


def client(fake, **options):
    return HttpClient(fake.url, **{"retry": FAST, **options})


# -- http


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
def test_passing_statuses_are_tried_again(fake, status):
    fake.faults = [status, status]
    c = client(fake)
    assert c.post("/v1/chat/completions", {"model": "m", "messages": [{"content": "x"}]})["model"] == "m"
    assert len(fake.bodies) == 3 and c.num_retries == 2


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_other_statuses_are_not(fake, status):
    fake.faults = [(status, {"Location": "http://elsewhere"})]
    with pytest.raises(Refused, match=f"{status}: fault {status}") as e:
        client(fake).post("/v1/completions", {})
    assert len(fake.bodies) == 1 and e.value.status == status
    assert fake.url in str(e.value)


def test_the_number_of_tries_is_bounded_and_told(fake):
    fake.always = 503
    with pytest.raises(Unreachable, match="failed 3 times; the last: status 503: fault 503") as e:
        client(fake).post("/v1/completions", {})
    assert len(fake.bodies) == 3
    assert f"{fake.url}/v1/completions" in str(e.value)


def test_nobody_listens():
    with pytest.raises(Unreachable, match="failed 2 times; the last: ConnectionRefusedError"):
        HttpClient(f"http://127.0.0.1:{free_port()}", retry=RetryPolicy(attempts=2, first_wait_s=0)).get("/health")


def test_a_silent_server_is_given_up(fake):
    fake.before = lambda body: time.sleep(0.3)
    with pytest.raises(Unreachable, match=r"failed 1 times; the last: TimeoutError"):
        client(fake, timeout_s=0.05, retry=RetryPolicy(attempts=1)).post("/v1/completions", {})


def test_waits_double_up_to_a_limit_and_depend_on_seed_and_request():
    policy = RetryPolicy(attempts=9, first_wait_s=1, max_wait_s=10)
    for tries, most in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (8, 10)):
        waits = [policy.wait_s(tries, random.Random(i)) for i in range(200)]
        assert 0.5 * most <= min(waits) < 0.6 * most and 0.9 * most < max(waits) <= most
    with FakeVLLM() as fake:
        fake.always = 500

        def waits_of(seed, body):
            slept = []
            with pytest.raises(Unreachable):
                client(fake, seed=seed, sleep=slept.append, retry=RetryPolicy(attempts=4)).post("/v1/completions", body)
            return slept

        assert waits_of(1, {"a": 1}) == waits_of(1, {"a": 1})
        assert waits_of(1, {"a": 1}) != waits_of(2, {"a": 1}) != waits_of(2, {"a": 2})


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(fake, as_date):
    after = email.utils.formatdate(time.time() + 7, usegmt=True) if as_date else "7"
    fake.faults = [(429, {"Retry-After": after})]
    slept = []
    client(fake, sleep=slept.append).post("/v1/chat/completions", {"model": "m", "messages": [{"content": "x"}]})
    assert len(slept) == 1 and slept[0] == pytest.approx(7, abs=1.5)


def test_a_retry_after_that_is_too_long_ends_it(fake):
    fake.always = (429, {"Retry-After": "90000"})
    with pytest.raises(Refused, match="wait 90000 s, more than the 600 s"):
        client(fake).post("/v1/completions", {})
    assert len(fake.bodies) == 1


def test_the_key_goes_out_and_is_never_told(fake, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret-123")
    c = client(fake, api_key_env="SOME_KEY")
    c.get("/health")
    assert fake.headers[-1]["Authorization"] == "Bearer sk-secret-123"
    fake.other = lambda request, path, body: __import__("vllm_fake_server").send(
        request, 401, {"error": {"message": "bad key sk-secret-123"}}
    )
    with pytest.raises(Refused) as e:
        c.get("/v1/models")
    assert "sk-secret-123" not in str(e.value) + repr(c) and "$SOME_KEY" in str(e.value) and "<key>" in str(e.value)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigError, match=r"\$SOME_KEY, which is not set"):
        client(fake, api_key_env="SOME_KEY")


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x", "http://user:pw@host"])
def test_addresses_that_are_none_are_refused(url):
    with pytest.raises(ConfigError) as e:
        HttpClient(url)
    assert "pw" not in str(e.value)


def test_connections_are_kept_and_a_closed_one_is_replaced(fake):
    c = client(fake)
    for _ in range(5):
        c.get("/health")
    assert c._idle.qsize() == 1
    kept = c._idle.queue[0].sock
    kept.shutdown(2)
    c.get("/health")
    assert c.num_retries == 0  # losing an idle connection is no failure
    c.close()


def test_rate_limits_space_requests_and_tokens():
    now = [100.0]
    slept = []

    def sleep(s):
        slept.append(s)
        now[0] += s

    limit = RateLimit(requests_per_s=4, tokens_per_minute=600, clock=lambda: now[0], sleep=sleep)
    for _ in range(5):
        limit.acquire(tokens=1)
    assert slept == pytest.approx([0.25] * 4)
    limit.acquire(tokens=50)  # 50 tokens take 5 s of the minute
    limit.acquire(tokens=1)
    assert slept[-1] == pytest.approx(5)
    limit.settle(1, 21)  # the endpoint counted 20 more
    limit.acquire()
    assert slept[-1] == pytest.approx(2.1)
    with pytest.raises(ConfigError, match="requests_per_s must be positive, got 0"):
        RateLimit(requests_per_s=0)


def test_run_all_keeps_what_was_done_before_an_error():
    def square(i):
        if i == 5:
            raise SamplerError("five")
        return i * i

    done = []
    results, error = run_all(square, range(100), workers=2, on_done=lambda i, r: done.append((i, r)))
    assert str(error) == "five"
    assert results[:5] == [0, 1, 4, 9, 16] and results[5] is None and sum(r is not None for r in results) < 12
    assert sorted(done) == [(i, r) for i, r in enumerate(results) if r is not None]
    assert run_all(square, [], workers=2) == ([], None)


# -- the endpoint


def test_answers_come_in_order_with_seeds_of_their_own(fake):
    fake.before = lambda body: time.sleep(random.random() / 100)
    sampler = endpoint(fake)
    answers = sampler.ask(tasks(6), 3, PARAMS)
    assert [len(a) for a in answers] == [3] * 6
    for i, group in enumerate(answers):
        assert all(a.text.startswith(f"question {i} #") and a.finish == "stop" for a in group)
        assert len({a.text for a in group}) == 3
    body = fake.bodies[0]
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"], body["n"]) == (
        "fake",
        0.7,
        0.9,
        32,
        1,
    )
    assert fake.most <= 3
    assert sampler.counts["requests"] == 18
    assert sampler.counts["completion_tokens"] == sum(a.completion_tokens for g in answers for a in g) > 0
    again = endpoint(fake, workers=1).ask(tasks(6), 3, PARAMS)
    assert again == answers


def test_completions_have_text_and_no_tokens(fake):
    (group,) = endpoint(fake).complete(tasks(1), 2, PARAMS)
    assert [(c.token_ids, c.logprobs, c.finish) for c in group] == [((), None, "stop")] * 2
    assert group[0].text.startswith("question 0")


def test_equal_questions_get_answers_of_their_own(fake):
    one = Task(id="x", messages=({"role": "user", "content": "same"},))
    two = Task(id="y", messages=({"role": "user", "content": "same"},))
    answers = endpoint(fake).ask([one, two], 2, PARAMS)
    assert len({a.text for g in answers for a in g}) == 4


def test_a_stopped_run_asks_only_for_what_is_missing(fake, tmp_path):
    whole = endpoint(fake).ask(tasks(5), 2, PARAMS)
    num = len(fake.bodies)
    fake.faults = [None] * 4
    fake.always = 401
    stopped = pytest.raises(SamplerError, match=r"4 of 10 answers came and are in the journal; then: .*401")
    with RequestJournal(tmp_path / "j" / "asked.jsonl") as journal, stopped:
        endpoint(fake, journal=journal, workers=1).ask(tasks(5), 2, PARAMS)
    with (tmp_path / "j" / "asked.jsonl").open("ab") as f:
        f.write(b'{"key": "cut off by a cra')
    fake.always = None
    del fake.bodies[:]
    with RequestJournal(tmp_path / "j" / "asked.jsonl") as journal:
        assert (len(journal), journal.num_damaged) == (4, 1)
        sampler = endpoint(fake, journal=journal)
        answers = sampler.ask(tasks(5), 2, PARAMS)
    assert len(fake.bodies) == 6 and num == 10
    assert [[a.text for a in g] for g in answers] == [[a.text for a in g] for g in whole]
    assert sum(a.is_cached for g in answers for a in g) == 4
    assert (sampler.counts["cached"], sampler.counts["requests"]) == (4, 6)
    assert sampler.counts["completion_tokens_cached"] == sum(a.completion_tokens for g in whole[:2] for a in g)
    with RequestJournal(tmp_path / "j" / "asked.jsonl") as journal:
        del fake.bodies[:]
        endpoint(fake, journal=journal).ask(tasks(5), 2, PARAMS)
        assert fake.bodies == [] and journal.num_damaged == 1
        endpoint(fake, journal=journal).ask(tasks(5), 2, SamplingParams(temperature=0.8))
        assert len(fake.bodies) == 10  # another request
        with pytest.raises(ConfigError, match="another process"):
            RequestJournal(tmp_path / "j" / "asked.jsonl")


def test_a_request_that_fails_alone_becomes_a_record(fake, tmp_path):
    fake.faults = [None, 400, None]
    with RequestJournal(tmp_path / "j.jsonl") as journal:
        answers = endpoint(fake, journal=journal, workers=1).ask(tasks(4), 1, PARAMS)
        assert [g[0].finish for g in answers] == ["stop", "error", "stop", "stop"]
        assert "task t1" in answers[1][0].error and "fault 400" in answers[1][0].error
        assert len(journal) == 3
    lines = [json.loads(x) for x in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert [("reply" in x, "error" in x) for x in lines] == [(True, False), (False, True), (True, False), (True, False)]
    with RequestJournal(tmp_path / "j.jsonl") as journal:
        assert [g[0].finish for g in endpoint(fake, journal=journal).ask(tasks(4), 1, PARAMS)] == ["stop"] * 4


def test_many_failures_in_a_row_end_the_run(fake):
    fake.faults = [None] * 3
    fake.always = "drop"
    with pytest.raises(SamplerError, match="4 requests in a row had no answer") as e:
        endpoint(fake, workers=1, max_failures=4).ask(tasks(50), 1, PARAMS)
    assert "lost, for want of a journal" in str(e.value)
    # A connection that lay idle is replaced once, beyond the counted tries.
    assert 0 <= len(fake.bodies) - (3 + 4 * FAST.attempts) <= 1
    fake.faults, fake.always = [*[503] * 9, None, *[503] * 9], None
    sampler = endpoint(fake, workers=1, max_failures=4)
    answers = sampler.ask(tasks(10), 1, PARAMS)
    assert sum(bool(a.error) for g in answers for a in g) == sampler.counts["errors"] == 6


def test_what_else_an_answer_holds(fake):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}}
    message = {"content": None, "reasoning_content": "hm", "tool_calls": [call]}
    fake.chat = lambda body: {"choices": [{"message": message, "finish_reason": "tool_calls"}], "model": "m-2"}
    tool = {"type": "function", "function": {"name": "f"}}
    task = Task(id="t", messages=({"role": "user", "content": "q"},), tools=(tool,))
    ((a,),) = endpoint(fake, extra={"top_k": -1}, sends_seed=False, max_tokens_field="max_completion_tokens").ask(
        [task], 1, PARAMS
    )
    assert (a.text, a.reasoning, a.finish, a.model) == ("", "hm", "tool_calls", "m-2")
    assert a.message == {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}
    body = fake.bodies[0]
    assert body["tools"] == [tool] and body["top_k"] == -1 and "seed" not in body and "max_tokens" not in body
    assert body["max_completion_tokens"] == 32
    fake.chat = lambda body: {"error": "overloaded"}
    ((a,),) = endpoint(fake).ask([task], 1, PARAMS)
    assert a.finish == "error" and "overloaded" in a.error


def test_the_text_route_is_asked_where_prompts_are_rendered(fake):
    fake.answer = lambda body: {"choices": [{"text": body["prompt"].upper(), "finish_reason": "length"}]}
    ((a,),) = endpoint(fake, render=lambda task: f"<{task.messages[0]['content']}>").ask(tasks(1), 1, PARAMS)
    assert (a.text, a.finish) == ("<QUESTION 0>", "length")
    assert fake.paths[-1] == "/v1/completions"


def test_retokenisation_is_measured():
    answers = [
        Answer(key="a", text="ab", completion_tokens=2),
        Answer(key="b", text="cd", completion_tokens=3),
        Answer(key="c", error="x", finish="error"),
    ]
    got = retokenisation(answers, [[0, 1], [2, 9], []], lambda ids: "".join("abcd?"[min(i, 4)] for i in ids))
    assert got == {"data/frac_text_changed": 0.5, "data/tokens_per_counted_token": 0.8}


# -- servers of our own

_SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


def process_of(tmp_path, code=_SERVER, **options):
    port = free_port()
    command = [sys.executable, "-I", "-S", "-c", code, str(port)]
    return ServerProcess(command, port=port, env=dict(os.environ), log=tmp_path / "log", **options)


def is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_server_is_started_restarted_and_ended_with_its_children(tmp_path):
    process = process_of(tmp_path)
    process.start()
    try:
        assert process.is_alive
        first = process._process.pid
        os.killpg(first, signal.SIGKILL)
        process.restart()
        assert process.num_starts == 2 and is_gone(first)
        second = process._process.pid
    finally:
        process.stop()
    assert is_gone(second) and not process.is_alive


def test_a_server_that_cannot_start_shows_its_log(tmp_path):
    process = process_of(tmp_path, "import sys; print('no memory'); sys.exit(3)")
    with pytest.raises(SamplerError, match="ended with code 3") as e:
        process.start()
    assert "no memory" in str(e.value) and str(tmp_path / "log") in str(e.value)
    slow = process_of(tmp_path, "import time; time.sleep(60)", start_s=0.3)
    with pytest.raises(SamplerError, match="not healthy within 0 s"):
        slow.start()
    assert not slow.is_alive


def test_a_server_dies_with_the_process_that_started_it(tmp_path):
    program = f"""
import os, sys, threading, time
from pathlib import Path
from tutelage.policies.vllm_launch import ServerProcess
process = ServerProcess({[sys.executable, "-I", "-S", "-c", _SERVER]!r} + ["{(port := free_port())}"],
    port={port}, env=dict(os.environ), log=Path({str(tmp_path / "log")!r}))
thread = threading.Thread(target=process.start); thread.start(); thread.join()
print(process._process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        group = int(parent.stdout.readline())
        assert not is_gone(group)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    deadline = time.monotonic() + 20
    while not is_gone(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(group)


def test_the_command_is_set_up_for_exact_logprobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUTELAGE_VLLM_PYTHON", raising=False)
    with pytest.raises(MissingExtra, match=r"vllm_env\.sh"):
        vllm_python()
    monkeypatch.setenv("TUTELAGE_VLLM_PYTHON", sys.executable)
    process = vllm_process(tmp_path, max_model_len=99, is_eager=True, args=["--seed", "1"], env={"A": "b"})
    command = " ".join(process._command)
    for part in ("--logprobs-mode processed_logprobs", "--generation-config vllm", "--max-model-len 99", "--seed 1"):
        assert part in command
    assert "--host 127.0.0.1" in command and process._env["VLLM_SERVER_DEV_MODE"] == "1"
    assert ("--no-enable-chunked-prefill" in command) == (not torch.cuda.is_available())
    assert process._env["A"] == "b" and process._env["HF_HUB_OFFLINE"] == "1"


def test_threads_share_one_client(fake):
    c = client(fake)
    with_threads = [threading.Thread(target=c.get, args=("/health",)) for _ in range(20)]
    for t in with_threads:
        t.start()
    for t in with_threads:
        t.join()
    assert fake.paths.count("/health") == 20
    c.close()
