"""Samplers and scorers against a server that speaks vLLM's protocol over a table of logits."""

import math

import numpy as np
import pytest
import torch
from vllm_fake_server import END, TABLE, WORDS, FakeVLLM, log_softmax, shaped

from tutelage.errors import ConfigError, SamplerError
from tutelage.policies.http import RetryPolicy
from tutelage.policies.vllm_server import VLLMSampler, VLLMScorer, VLLMServer
from tutelage.types import SampleRequest, SamplingParams, Span, Trajectory

FAST = RetryPolicy(attempts=3, first_wait_s=0.001)


@pytest.fixture
def fake():
    with FakeVLLM() as server:
        yield server


def server_of(fake, **options):
    return VLLMServer(fake.url, **{"retry": FAST, "revive_s": 0.2, **options})


def sampler_of(*servers, **options):
    decode = lambda ids: "".join(WORDS[i] for i in ids)  # noqa: E731
    return VLLMSampler(list(servers), **{"stop_ids": [END], "decode": decode, "workers": 4, **options})


def trajectory(prompt, answer, name="t"):
    spans = (
        Span(token_ids=tuple(prompt), role="user", author="user"),
        Span(token_ids=tuple(answer), role="assistant", author="student", is_sampled=True, is_trainable=True),
        Span(token_ids=(0, 1), role="tool", author="environment"),
    )
    return Trajectory(id=name, task_id=name, task_hash=name, spans=spans)


class Progress:
    def __init__(self):
        self.done = 0

    def start(self, what, total, unit):
        pass

    def advance(self, amount=1, **numbers):
        self.done += amount

    def finish(self):
        pass


# -- sampling


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (0.8, 0.6), (0.0, 1.0)])
def test_logprobs_are_those_of_the_sampled_distribution(fake, temperature, top_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=12)
    requests = [SampleRequest(prompt_ids=(0, i % 4), n=3, seed=i) for i in range(6)]
    progress = Progress()
    answers = sampler_of(server_of(fake)).sample(requests, params, progress=progress)
    assert [len(a) for a in answers] == [3] * 6
    assert progress.done == 18
    for request, completions in zip(requests, answers, strict=True):
        for c in completions:
            before = request.prompt_ids[-1]
            for token, logprob in zip(c.token_ids, c.logprobs, strict=True):
                assert logprob == pytest.approx(shaped(TABLE[before], temperature, top_p)[token], abs=1e-6)
                before = token
            ended = c.token_ids[-1] == END
            assert c.finish == ("stop" if ended else "length")
            assert c.text == "".join(WORDS[i] for i in (c.token_ids[:-1] if ended else c.token_ids))
            assert c.entropies is None


def test_samples_have_seeds_of_their_own_and_repeat(fake):
    request = SampleRequest(prompt_ids=(0, 1, 2), n=16, seed=5)
    params = SamplingParams(max_new_tokens=8)
    first = sampler_of(server_of(fake)).sample([request], params)
    again = sampler_of(server_of(fake), workers=1).sample(
        [SampleRequest(prompt_ids=(3,), n=1, seed=9), request], params
    )
    assert first[0] == again[1]
    assert len({c.token_ids for c in first[0]}) > 4
    seeds = [b["seed"] for b in fake.bodies[:16]]
    assert len(set(seeds)) == 16 and all(b["n"] == 1 for b in fake.bodies)
    assert max(seeds) < 2**63


def test_every_setting_that_shapes_is_sent(fake):
    sampler_of(server_of(fake)).sample([SampleRequest(prompt_ids=(1,), n=1, seed=0)], SamplingParams())
    body = fake.bodies[-1]
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": [END]}
    assert {k: body[k] for k in neutral} == neutral
    assert body["prompt"] == [1] and body["return_token_ids"] is True


def test_a_server_with_unshaped_logprobs_is_refused_where_it_matters():
    with FakeVLLM(mode="raw_logprobs") as fake:
        sampler = sampler_of(server_of(fake))
        request = [SampleRequest(prompt_ids=(0, 1), n=1, seed=0)]
        for params in (SamplingParams(temperature=0.7), SamplingParams(top_p=0.9)):
            with pytest.raises(ConfigError, match="processed_logprobs") as e:
                sampler.sample(request, params)
            assert str(params.temperature) in str(e.value) and fake.url in str(e.value)
        for params in (SamplingParams(max_new_tokens=4), SamplingParams(temperature=0, max_new_tokens=4)):
            assert len(sampler.sample(request, params)[0]) == 1


def test_stop_strings_keep_the_token_that_completed_them(fake):
    params = SamplingParams(max_new_tokens=40, stop=("ab",))
    answers = sampler_of(server_of(fake)).sample([SampleRequest(prompt_ids=(0,), n=30, seed=1)], params)[0]
    stopped = [c for c in answers if c.finish == "stop_string"]
    assert stopped
    for c in stopped:
        assert c.text.endswith("ab") and c.text.count("ab") == 1
        assert c.token_ids[-2:] == (0, 1)


def test_completions_are_cut_to_the_servers_length(fake):
    fake.max_model_len = 10
    answers = sampler_of(server_of(fake)).sample(
        [SampleRequest(prompt_ids=(0,) * 7, n=8, seed=1)], SamplingParams(max_new_tokens=50)
    )
    assert max(len(c.token_ids) for c in answers[0]) == 3
    with pytest.raises(SamplerError, match=r"10 tokens leaves no room.*10 in all"):
        sampler_of(server_of(fake)).sample([SampleRequest(prompt_ids=(0,) * 10, n=1, seed=1)], SamplingParams())


# -- wrong answers


@pytest.mark.parametrize(
    ("fault", "words"),
    [("wrong_ids", r"read 3 for 3, first different at 2: \[0\] for \[2\]"), ("no_ids", "return_token_ids")],
)
def test_other_prompt_ids_are_refused(fake, fault, words):
    fake.always = fault
    with pytest.raises(SamplerError, match=words):
        sampler_of(server_of(fake)).sample([SampleRequest(prompt_ids=(0, 1, 2), n=1, seed=0)], SamplingParams())
    with pytest.raises(SamplerError, match=words):
        VLLMScorer(server_of(fake)).score([trajectory((0, 1), (2,))])


def test_a_refused_request_is_not_tried_again(fake):
    fake.always = 400
    with pytest.raises(SamplerError, match="400: fault 400"):
        sampler_of(server_of(fake), workers=1).sample([SampleRequest(prompt_ids=(0,), n=3, seed=0)], SamplingParams())
    assert len(fake.bodies) == 1


# -- dying servers


@pytest.mark.parametrize("fault", ["drop", "cut", "garbage", 500, 503, "abort"])
def test_a_passing_fault_changes_nothing(fake, fault):
    request = [SampleRequest(prompt_ids=(0, 1), n=10, seed=3)]
    params = SamplingParams(max_new_tokens=6)
    expected = sampler_of(server_of(fake)).sample(request, params)
    fake.faults = [None, fault, None, fault]
    assert sampler_of(server_of(fake)).sample(request, params) == expected


def test_a_server_that_fails_its_first_question_is_revived(fake):
    fake.faults = [503] * FAST.attempts
    params = SamplingParams(temperature=0.5, max_new_tokens=4)
    answers = sampler_of(server_of(fake)).sample([SampleRequest(prompt_ids=(0, 1), n=2, seed=3)], params)
    assert len(answers[0]) == 2


def test_a_dead_server_stops_the_round(fake):
    fake.faults = [None] * 5
    fake.always = "drop"
    with pytest.raises(
        SamplerError, match=r"none of 1 servers answers after a revival: .*/v1/completions failed 3 times"
    ):
        sampler_of(server_of(fake), workers=2).sample([SampleRequest(prompt_ids=(0,), n=12, seed=3)], SamplingParams())


def test_requests_of_a_dead_server_go_to_the_others(fake):
    request = [SampleRequest(prompt_ids=(0, i), n=4, seed=i) for i in range(4)]
    params = SamplingParams(max_new_tokens=6)
    expected = sampler_of(server_of(fake)).sample(request, params)
    with FakeVLLM() as other:
        dead = server_of(other)
        assert dead.model == "fake"
    sampler = sampler_of(dead, server_of(fake))
    assert sampler.sample(request, params) == expected


def test_requests_are_spread_by_index(fake):
    with FakeVLLM() as other:
        sampler = sampler_of(server_of(fake), server_of(other))
        sampler.sample([SampleRequest(prompt_ids=(0, i % 5), n=2, seed=i) for i in range(6)], SamplingParams())
        assert len(fake.bodies) == len(other.bodies) == 6


def test_a_server_that_is_ours_is_restarted_with_its_weights(fake):
    class Process:
        num = 0

        def restart(self):
            self.num += 1
            fake.always = None
            fake.restart()

    process = Process()
    server = server_of(fake, process=process)
    sampler = sampler_of(server)
    table = torch.tensor(TABLE).flip(1).contiguous()
    sampler.push_weights({"table": table}, "round1")
    params = SamplingParams(max_new_tokens=6)
    request = [SampleRequest(prompt_ids=(0, 1), n=12, seed=3)]
    expected = sampler.sample(request, params)

    server.is_healthy = lambda: fake.always is None
    fake.faults = [None, None, None]
    fake.always = "drop"
    assert sampler.sample(request, params) == expected
    assert process.num == 1
    assert fake.version.startswith("round1+")
    server.close()


# -- weights


def test_pushed_weights_answer_and_are_named(fake, tmp_path):
    server = server_of(fake, weights_dir=tmp_path)
    sampler, scorer = sampler_of(server), VLLMScorer(server)
    t = trajectory((0, 1), (2, 3, END))
    before = scorer.score([t])[0]
    table = torch.tensor(TABLE) * 2 - 0.3
    sampler.push_weights({"table": table, "tied": table}, "stage0-round1")
    expected = [log_softmax(table[a].tolist())[b] for a, b in [(1, 2), (2, 3), (3, END)]]
    np.testing.assert_allclose(scorer.score([t])[0], expected, atol=1e-5)
    assert not np.allclose(before, expected, atol=0.05)
    assert sampler.version == server.weights_version == fake.version == "stage0-round1"
    paths = [p for p in fake.paths if p.startswith(("/pause", "/coll", "/reset", "/update", "/resume"))]
    assert paths == ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    sampler.push_weights({"table": table}, "stage0-round2")
    assert len(list(tmp_path.iterdir())) == 1
    server.close()
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_lost_its_weights_gets_them_again(fake):
    server = server_of(fake)
    sampler = sampler_of(server)
    sampler.push_weights({"table": torch.tensor(TABLE) * 3}, "round1")
    request, params = [SampleRequest(prompt_ids=(0, 1), n=6, seed=3)], SamplingParams(max_new_tokens=6)
    expected = sampler.sample(request, params)
    fake.restart()  # between rounds
    assert sampler.sample(request, params) == expected
    fake.before = lambda body: fake.restart() if len(fake.bodies) == 15 else None  # inside a round
    assert sampler.sample(request, params) == expected
    assert len(fake.bodies) == 24  # the third round was drawn twice
    server.close()


def test_answers_of_lost_weights_do_not_pass_because_another_process_loaded_them_again(fake):
    """Two processes ask one server; it restarts, one of them notices first, and the other's answers are from before."""
    server, others = server_of(fake), server_of(fake)
    sampler = sampler_of(server, workers=1)
    sampler.push_weights({"table": torch.tensor(TABLE) * 3}, "round1")
    others.adopt_weights(server.pushed, "round1")
    request, params = [SampleRequest(prompt_ids=(0, 1), n=6, seed=3)], SamplingParams(max_new_tokens=6)
    expected = sampler.sample(request, params)

    def meanwhile(body):
        if len(fake.bodies) == 8:
            fake.restart()
        if len(fake.bodies) == 11:
            others.ensure_weights()

    fake.before = meanwhile
    assert sampler.sample(request, params) == expected
    assert len(fake.bodies) == 18
    server.close()


@pytest.mark.parametrize(
    ("options", "state", "words"),
    [
        ({"has_dev_routes": False}, "table", "takes no weights: start it with VLLM_SERVER_DEV_MODE=1"),
        ({"has_extension": False}, "table", "worker-extension-cls tutelage_vllm_worker.Extension"),
        ({}, "other", r"1 are not in the state dict \(table\)"),
    ],
)
def test_a_push_that_fails_says_why_and_lets_nothing_be_sampled(options, state, words):
    with FakeVLLM(**options) as fake:
        server = server_of(fake)
        sampler = sampler_of(server)
        with pytest.raises(SamplerError, match=words):
            sampler.push_weights({state: torch.tensor(TABLE)}, "round1")
        assert sampler.version == "base"
        with pytest.raises(SamplerError):
            sampler.sample([SampleRequest(prompt_ids=(0,), n=1, seed=0)], SamplingParams())
        assert fake.bodies == []
        server.close()


# -- scoring


def test_scores_are_those_of_the_targets(fake):
    rows = [trajectory((0, 1), (2, 3, END), "x"), trajectory((3,), (1,), "y"), trajectory((2,), (), "none")]
    scores = VLLMScorer(server_of(fake)).score(rows)
    expected = [[log_softmax(TABLE[a])[b] for a, b in [(1, 2), (2, 3), (3, END)]], [log_softmax(TABLE[3])[1]], []]
    for got, want in zip(scores, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert [b["prompt"] for b in sorted(fake.bodies, key=lambda b: -len(b["prompt"]))] == [[0, 1, 2, 3, END], [3, 1]]
    assert {b["temperature"] for b in fake.bodies} == {1.0}


def test_a_trajectory_that_begins_with_a_target_has_no_score_for_it(fake):
    span = Span(token_ids=(1, 2), role="assistant", author="student", is_sampled=True, is_trainable=True)
    t = Trajectory(id="t", task_id="t", task_hash="t", spans=(span,))
    np.testing.assert_allclose(VLLMScorer(server_of(fake)).score([t])[0], [log_softmax(TABLE[1])[2]], atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_in_order_and_apart_from_the_target(fake, k):
    t = trajectory((0, 1), (2, 3, 0))
    (top,) = VLLMScorer(server_of(fake)).top_k([t], k)
    assert top.ids_CK.shape == top.logprobs_CK.shape == (3, k)
    for row, (before, target) in enumerate([(1, 2), (2, 3), (3, 0)]):
        logprobs = log_softmax(TABLE[before])
        order = sorted(range(5), key=lambda i: -logprobs[i])[:k]
        assert sorted(top.ids_CK[row].tolist()) == sorted(order) or k == 1
        np.testing.assert_allclose(top.logprobs_CK[row], [logprobs[i] for i in order], atol=1e-6)
        np.testing.assert_allclose([logprobs[i] for i in top.ids_CK[row]], top.logprobs_CK[row], atol=1e-6)
        assert top.target_logprobs_C[row] == pytest.approx(logprobs[target], abs=1e-6)


def test_bad_settings_are_refused(fake):
    with pytest.raises(ConfigError, match="k of at least 1, got 0"):
        VLLMScorer(server_of(fake)).top_k([], 0)
    with pytest.raises(ConfigError, match="stop_ids"):
        sampler_of(server_of(fake), stop_ids=[])
    with pytest.raises(ConfigError, match="0 and 4"):
        sampler_of()
    with pytest.raises(SamplerError, match="it serves fake"):
        server_of(fake, model="other").model  # noqa: B018
    assert math.isfinite(server_of(fake).max_model_len)
