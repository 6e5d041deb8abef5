"""A real server's answers, recorded (`test_vllm_real.py`), through the same code as live ones."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tutelage.policies.http import HttpClient
from tutelage.policies.vllm_server import VLLMSampler, VLLMScorer, VLLMServer
from tutelage.types import SampleRequest, SamplingParams, Span, Trajectory

DATA = Path(__file__).parent / "data_vllm" / "exchange.json.gz"
END = 2


@pytest.fixture(scope="module")
def recorded():
    return json.loads(gzip.decompress(DATA.read_bytes()))


@pytest.fixture
def server(recorded, monkeypatch):
    replies = {}
    for e in recorded["exchange"]:
        replies[e["method"], e["path"], json.dumps(e["body"], sort_keys=True)] = e["reply"]

    def replay(self, method, path, body, **options):
        return replies[method, path, json.dumps(body, sort_keys=True)]

    monkeypatch.setattr(HttpClient, "request", replay)
    return VLLMServer("http://127.0.0.1:1", model="MODEL")


def test_every_request_is_still_the_recorded_one_and_its_answer_is_read_alike(recorded, server):
    requests = [SampleRequest(prompt_ids=tuple(p), n=2, seed=i) for i, p in enumerate(recorded["prompts"])]
    finishes = set()
    for options, expected in zip(recorded["settings"], recorded["answers"], strict=True):
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        sampler = VLLMSampler(server, stop_ids=[END], decode=lambda ids: "")
        answers = sampler.sample(requests, SamplingParams(**{"max_new_tokens": 20, **options}))
        got = [[[list(c.token_ids), list(c.logprobs), c.finish] for c in group] for group in answers]
        assert got == [[answer[:3] for answer in group] for group in expected]
        finishes |= {c.finish for group in answers for c in group}
        for group in answers:
            for c in group:
                assert (c.token_ids[-1] == END) == (c.finish == "stop")
                assert END not in c.token_ids[:-1]
    assert {"length", "stop_string"} <= finishes


def test_recorded_scores_are_those_of_a_forward_pass(recorded, server):
    rows = []
    for i, prompt in enumerate(recorded["prompts"]):
        spans = (
            Span(token_ids=tuple(prompt), role="user", author="user"),
            Span(
                token_ids=(*prompt[5:20], END), role="assistant", author="student", is_sampled=True, is_trainable=True
            ),
        )
        rows.append(Trajectory(id=str(i), task_id=str(i), task_hash=str(i), spans=spans))
    scorer = VLLMScorer(server)
    scores, tops = scorer.score(rows), scorer.top_k(rows, 4)
    for score, top, want in zip(scores, tops, recorded["forward_logprobs"], strict=True):
        assert len(score) == 16
        assert np.abs(np.array(score) - want).mean() < 0.06  # bfloat16 there, float32 here
        np.testing.assert_allclose(top.target_logprobs_C, score, atol=0.05)
        assert top.ids_CK.shape == (16, 4) and (np.diff(top.logprobs_CK) <= 0).all()
        assert (np.exp(top.logprobs_CK).sum(-1) <= 1.001).all()
