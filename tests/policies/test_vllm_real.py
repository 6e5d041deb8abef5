"""The real vLLM server on SmolLM2, against transformers' own forward pass. Needs `.vllm-venv` (`make vllm-env`).

`TUTELAGE_RECORD_VLLM=1` writes the exchange that `test_vllm_replay.py` plays back.
"""

import gzip
import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tutelage.errors import MissingExtra, SamplerError
from tutelage.policies.http import HttpClient
from tutelage.policies.smollm2 import smollm2_path
from tutelage.policies.vllm_launch import vllm_python
from tutelage.policies.vllm_server import VLLMSampler, VLLMScorer, VLLMServer, launch_server
from tutelage.types import SampleRequest, SamplingParams, Span, Trajectory

DATA = Path(__file__).parent / "data_vllm"
QUESTIONS = ["What is 2 + 3?", "Name a colour.", "Write one short sentence about the sea.", "Is ice cold?"]
END = 2


def _missing():
    try:
        vllm_python()
        smollm2_path()
    except MissingExtra as e:
        return str(e)
    return None


pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(_missing() is not None, reason=f"no real vLLM server: {_missing()}"),
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path())


@pytest.fixture(scope="module")
def prompts(tokenizer):
    out = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        out.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return out


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    with launch_server(
        smollm2_path(),
        max_model_len=512,
        cpu_threads=1,
        cpu_cache_gb=1,
        start_s=900,
        log=folder / "log",
        weights_dir=folder / "w",
    ) as server:
        group = server.process._process.pid
        yield server
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


@pytest.fixture
def record(server):
    """Calls that keep every exchange, where a recording is asked for."""
    if not os.environ.get("TUTELAGE_RECORD_VLLM"):
        yield None
        return
    kept, plain = [], HttpClient.request

    def keep(self, method, path, body, **options):
        reply = plain(self, method, path, body, **options)
        kept.append({"method": method, "path": path, "body": body, "reply": reply})
        return reply

    HttpClient.request = keep
    try:
        yield kept
    finally:
        HttpClient.request = plain


def sampler_of(server, tokenizer, **options):
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return VLLMSampler(server, stop_ids=[END], decode=decode, **{"workers": 8, **options})


def hf_logprobs(model, ids, dtype=None):
    """(L, V) float32; row i is for token i, row 0 is nan."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].float()
    return torch.cat([torch.full((1, logits.shape[1]), math.nan), logits.log_softmax(-1)[:-1]])


def trajectory(prompt, completion, name="t"):
    spans = (
        Span(token_ids=prompt, role="user", author="user"),
        Span(token_ids=completion, role="assistant", author="student", is_sampled=True, is_trainable=True),
    )
    return Trajectory(id=name, task_id=name, task_hash=name, spans=spans)


def perturbed(model, scale):
    """The state dict with noise of `scale` times each tensor's spread; tied weights stay tied."""
    stream = torch.Generator().manual_seed(0)
    out, seen = {}, {}
    for name, w in model.state_dict().items():
        if w.data_ptr() not in seen:
            seen[w.data_ptr()] = w + scale * w.std() * torch.randn(w.shape, generator=stream)
        out[name] = seen[w.data_ptr()]
    return out


def test_greedy_tokens_are_the_models_own(server, tokenizer, prompts, model):
    params = SamplingParams(temperature=0, max_new_tokens=16)
    answers = sampler_of(server, tokenizer).sample([SampleRequest(prompt_ids=p, n=1, seed=0) for p in prompts], params)
    gaps, num_equal = [], 0
    for prompt, (c,) in zip(prompts, answers, strict=True):
        logprobs = hf_logprobs(model, prompt + c.token_ids)[len(prompt) :]
        chosen = logprobs.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
        gaps += (logprobs.max(-1).values - chosen).tolist()
        num_equal += sum(g == 0 for g in gaps)
        assert c.finish == ("stop" if c.token_ids[-1] == END else "length")
        np.testing.assert_allclose(c.logprobs, chosen, atol=0.3)
    assert max(gaps) < 0.25  # bf16 rounding decides only between near equals
    assert sum(g > 0 for g in gaps) <= 0.1 * len(gaps)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.8)])
def test_stored_logprobs_are_of_the_shaped_distribution(server, tokenizer, prompts, model, temperature, top_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=16)
    answers = sampler_of(server, tokenizer).sample([SampleRequest(prompt_ids=p, n=2, seed=7) for p in prompts], params)
    errors, unshaped, outside = [], [], 0
    for prompt, completions in zip(prompts, answers, strict=True):
        assert completions[0].token_ids != completions[1].token_ids
        for c in completions:
            rows = hf_logprobs(model, prompt + c.token_ids)[len(prompt) :]
            for row, token, logprob in zip(rows, c.token_ids, c.logprobs, strict=True):
                q = (row / temperature).log_softmax(-1)
                order = q.argsort(descending=True)
                before = q[order].exp().cumsum(0) - q[order].exp()
                kept = order[before < top_p]
                unshaped.append(abs(float(row[token]) - logprob))
                if token not in kept:
                    outside += 1  # at the border of the nucleus rounding decides
                else:
                    errors.append(abs(float(q[token] - q[kept].logsumexp(0)) - logprob))
    assert np.mean(errors) < 0.05 and outside <= 0.02 * len(errors) + 1
    if (temperature, top_p) != (1.0, 1.0):
        assert np.mean(unshaped) > 3 * np.mean(errors)


def test_scores_and_top_k_match_a_forward_pass(server, prompts, model):
    rows = [trajectory(p, (*p[5:20], END), str(i)) for i, p in enumerate(prompts)]
    scorer = VLLMScorer(server)
    scores, tops = scorer.score(rows), scorer.top_k(rows, 16)
    for t, score, top in zip(rows, scores, tops, strict=True):
        logprobs = hf_logprobs(model, t.token_ids)[-16:]
        targets = torch.tensor(t.token_ids[-16:])
        want = logprobs.gather(1, targets[:, None])[:, 0].numpy()
        assert np.abs(np.array(score) - want).mean() < 0.06
        np.testing.assert_allclose(top.target_logprobs_C, score, atol=0.05)
        best = logprobs.topk(16).indices
        overlap = [len(set(a) & set(b)) / 16 for a, b in zip(top.ids_CK.tolist(), best.tolist(), strict=True)]
        assert np.mean(overlap) > 0.9
        want_k = logprobs.gather(1, torch.from_numpy(top.ids_CK).long()).numpy()
        assert np.abs(top.logprobs_CK - want_k).mean() < 0.15  # bf16 logits: steps of 1/16 and more, in the tail too
        assert np.abs(np.exp(top.logprobs_CK) - np.exp(want_k)).sum(-1).mean() < 0.05
        assert (np.diff(top.logprobs_CK) <= 0).all()
    with pytest.raises(SamplerError, match="64"):
        scorer.top_k(rows[:1], 65)


@pytest.mark.parametrize("has_tied_names", [True, False])
def test_pushed_weights_are_what_answers(server, tokenizer, prompts, model, has_tied_names):
    """The gap to the trainer's new weights falls to what rounding leaves; with the old ones it is many times that.
    Weights pushed back give the first scores bit for bit, so nothing of a push is left behind."""
    rows = [trajectory(p, (*p[5:20], END), str(i)) for i, p in enumerate(prompts)]
    sampler, scorer = sampler_of(server, tokenizer), VLLMScorer(server, workers=1)
    first = scorer.score(rows)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    new = perturbed(model, 0.1)

    def gap(scores):
        want = [hf_logprobs(model, t.token_ids)[-16:] for t in rows]
        ids = [torch.tensor(t.token_ids[-16:])[:, None] for t in rows]
        pairs = zip(scores, want, ids, strict=True)
        return float(np.mean([np.abs(np.array(s) - w.gather(1, i)[:, 0].numpy()).mean() for s, w, i in pairs]))

    before = gap(first)
    try:
        model.load_state_dict(new)
        stale = gap(first)
        started = time.perf_counter()
        sampler.push_weights({k: v for k, v in new.items() if has_tied_names or k != "lm_head.weight"}, "round1")
        print(f"push: {time.perf_counter() - started:.1f} s")
        after = gap(scorer.score(rows))
        print(f"gap before {before:.3f}, stale {stale:.3f}, after {after:.3f} nats a token")
        assert after < 0.15 and stale > 8 * after

        params = SamplingParams(temperature=0.8, max_new_tokens=16)
        errors = []
        for prompt, (c,) in zip(
            prompts, sampler.sample([SampleRequest(prompt_ids=p, n=1, seed=1) for p in prompts], params), strict=True
        ):
            q = (hf_logprobs(model, prompt + c.token_ids)[len(prompt) :] / 0.8).log_softmax(-1)
            errors += (q.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0] - torch.tensor(c.logprobs)).abs().tolist()
        assert np.mean(errors) < 0.2
    finally:
        model.load_state_dict(old)
        sampler.push_weights(old, "base")
    assert scorer.score(rows) == first

    with pytest.raises(SamplerError, match="not in the state dict"):
        sampler.push_weights({k: v for k, v in old.items() if "layers.7.mlp" not in k}, "broken")
    sampler.push_weights(old, "base")
    assert scorer.score(rows) == first


def test_recorded_exchange(record, server, tokenizer, prompts, model):
    """Writes `data_vllm/exchange.json.gz` when asked to: the answers, and what transformers says of the same tokens."""
    if record is None:
        pytest.skip("set TUTELAGE_RECORD_VLLM=1 to record")
    server = VLLMServer(server.url)  # nothing remembered, so everything is asked
    requests = [SampleRequest(prompt_ids=p, n=2, seed=i) for i, p in enumerate(prompts)]
    answers = []
    settings = [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}, {"stop": ("is",)}]
    for options in settings:
        drawn = sampler_of(server, tokenizer).sample(requests, SamplingParams(**{"max_new_tokens": 20, **options}))
        answers.append([[[list(c.token_ids), list(c.logprobs), c.finish, c.text] for c in cs] for cs in drawn])
    rows = [trajectory(p, (*p[5:20], END), str(i)) for i, p in enumerate(prompts)]
    scorer = VLLMScorer(server)
    scorer.score(rows)
    scorer.top_k(rows, 4)
    forward = []
    for t in rows:
        logprobs = hf_logprobs(model, t.token_ids)[-16:]
        forward.append(logprobs.gather(1, torch.tensor(t.token_ids[-16:])[:, None])[:, 0].tolist())
    out = {
        "about": f"vLLM {server.vllm_version()}, SmolLM2-135M-Instruct dequantised from 4 bits, bfloat16, one CPU",
        "prompts": prompts,
        "settings": settings,
        "answers": answers,
        "forward_logprobs": forward,
        "exchange": record,
    }
    DATA.mkdir(exist_ok=True)
    text = json.dumps(out, separators=(",", ":")).replace(str(smollm2_path()), "MODEL").replace(server.model, "MODEL")
    with gzip.GzipFile(DATA / "exchange.json.gz", "wb", mtime=0) as f:
        f.write(text.encode())


def test_a_killed_server_comes_back_with_its_weights(server, tokenizer, prompts, model):
    sampler, scorer = sampler_of(server, tokenizer), VLLMScorer(server, workers=1)
    rows = [trajectory(p, (*p[5:20], END), str(i)) for i, p in enumerate(prompts)]
    sampler.push_weights(perturbed(model, 0.1), "round2")
    expected = scorer.score(rows)
    os.killpg(server.process._process.pid, signal.SIGKILL)
    assert scorer.score(rows) == expected
    assert server.process.num_starts == 2
