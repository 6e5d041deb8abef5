"""The sampler against the model itself: greedy equals `generate`, log-probabilities equal a full forward."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from tutelage.policies.sampler import InProcessSampler
from tutelage.types import SampleRequest, SamplingParams

VOCAB = 97
STOP = 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": STOP,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 1}
LINEAR = {
    **COMMON,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON, "fused"),
    "llama-multi-query": ("LlamaForCausalLM", "LlamaConfig", {**COMMON, "num_key_value_heads": 1}, "fused"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", COMMON, "fused"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**COMMON, "head_dim": 16}, "fused"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**COMMON, "sliding_window": None}, "fused"),
    "mistral-window": ("MistralForCausalLM", "MistralConfig", {**COMMON, "sliding_window": 6}, "plain"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "eos_token_id": STOP, "pad_token_id": 0}, "plain"),
    "gemma2-softcap": ("Gemma2ForCausalLM", "Gemma2Config", {**COMMON, "head_dim": 16, "sliding_window": 7}, "plain"),
    "gemma3-window": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**COMMON, "head_dim": 16, "sliding_window": 7},
        "plain",
    ),
    "lfm2-convolution": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {**COMMON, "layer_types": ["conv", "full_attention", "conv"]},
        "plain",
    ),
    "qwen3-next-linear": ("Qwen3NextForCausalLM", "Qwen3NextConfig", LINEAR, "plain"),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2},
        "recompute",
    ),
}
LENGTHS = (3, 11, 1, 20, 6, 60)
"""Ragged, some longer than every window, one that outgrows its pool of the cache while it decodes."""


def tiny_model(name):
    model_class, config_class, settings, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # default weights are so small that every token looks alike
            elif parameter.abs().sum() == 0:
                parameter.normal_(0, 0.1)  # biases start at 0 and would hide a bias that is left out
    return model


def requests(n=3, lengths=LENGTHS):
    return [
        SampleRequest(prompt_ids=tuple((7 * i + 3 * r + 5) % VOCAB for i in range(length)), n=n, seed=r)
        for r, length in enumerate(lengths)
    ]


def sampler_of(model, **settings):
    settings = {"max_batch": 5, "stop_ids": [STOP], "decode": lambda ids: " ".join(map(str, ids)), **settings}
    return InProcessSampler(model, **settings)


def full_forward_logprobs(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        return model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate_and_logprobs_equal_a_full_forward(name):
    model = tiny_model(name)
    sampler = sampler_of(model)
    asked = requests(n=2)
    greedy = sampler.sample(asked, SamplingParams(temperature=0, max_new_tokens=10))
    assert sampler.engine_name == MODELS[name][3], sampler.engine_notes
    for request, answers in zip(asked, greedy, strict=True):
        ids = torch.tensor([request.prompt_ids])
        with torch.no_grad():
            expected = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=10,
                eos_token_id=STOP,
                pad_token_id=0,
            )
        expected = tuple(expected[0, len(request.prompt_ids) :].tolist())
        assert [a.token_ids for a in answers] == [expected, expected]

    for request, answers in zip(asked, sampler.sample(asked, SamplingParams(max_new_tokens=9)), strict=True):
        for answer in answers:
            logprobs = full_forward_logprobs(model, request.prompt_ids, answer.token_ids)
            chosen = logprobs.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            assert answer.logprobs == pytest.approx(chosen.tolist(), abs=1e-5)
            entropies = -(logprobs.exp() * logprobs).sum(-1)
            assert answer.entropies == pytest.approx(entropies.tolist(), abs=1e-5)


@pytest.mark.parametrize("engine", ["fused", "plain", "recompute"])
def test_every_engine_gives_the_same_answers(engine):
    model = tiny_model("llama")
    got = sampler_of(model, engine=engine).sample(requests(), SamplingParams(max_new_tokens=12, temperature=0.9))
    same = sampler_of(model, engine="recompute", max_batch=1)
    expected = same.sample(requests(), SamplingParams(max_new_tokens=12, temperature=0.9))
    assert [[c.token_ids for c in g] for g in got] == [[c.token_ids for c in g] for g in expected]


@pytest.mark.parametrize(("decoding", "engine"), [("auto", "fused"), ("plain", "plain"), ("recompute", "recompute")])
def test_a_run_may_switch_the_fast_path_off(decoding, engine):
    from tutelage.methods.rollouts import Rollouts
    from tutelage.methods.settings import RolloutSettings

    text = SimpleNamespace(stop_ids=[STOP], completion_text=lambda ids: " ".join(map(str, ids)))
    bench = SimpleNamespace(text=text, settings=RolloutSettings(decoding=decoding))
    sampler = Rollouts.in_process(bench, tiny_model("llama"), "student")
    sampler.sample(requests(n=1), SamplingParams(max_new_tokens=2))
    assert sampler.engine_name == engine


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_answer_does_not_depend_on_its_batch_mates(name):
    sampler = sampler_of(tiny_model(name))
    params = SamplingParams(max_new_tokens=10)
    together = sampler.sample(requests(), params)
    for request, answers in zip(requests(), together, strict=True):
        assert [c.token_ids for c in sampler.sample([request], params)[0]] == [c.token_ids for c in answers]


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_samples_of_a_group_share_the_work_on_their_prompt(engine):
    """Tokens that go through the model: each prompt once, and every sampled token but the last of an answer once."""
    model = tiny_model("llama")
    sampler = sampler_of(model, engine=engine, max_batch=7)
    asked = requests(n=8, lengths=(20, 20, 20))  # of one length, so that no padding is counted
    sampler.sample(asked[:1], SamplingParams(max_new_tokens=1))
    counted = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: counted.append(args[0].numel()))
    try:
        answers = sampler.sample(asked, SamplingParams(max_new_tokens=12))
    finally:
        hook.remove()
    lengths = [len(c.token_ids) for group in answers for c in group]
    assert min(lengths) < max(lengths)  # rows leave at different steps: none is computed after it has ended
    assert sum(counted) == 3 * 20 + sum(lengths) - len(lengths)


def test_shaped_logprobs_are_those_of_the_shaped_distribution_in_a_full_forward():
    from tutelage.numerics.logprobs import shape_logits

    model = tiny_model("qwen2")
    params = SamplingParams(max_new_tokens=10, temperature=0.7, top_p=0.8)
    for request, answers in zip(requests(), sampler_of(model).sample(requests(), params), strict=True):
        for answer in answers:
            ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
            logprobs = shape_logits(logits, temperature=0.7, top_p=0.8).log_softmax(-1)
            chosen = logprobs.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            assert answer.logprobs == pytest.approx(chosen.tolist(), abs=1e-5)


def test_new_weights_are_seen_whether_they_are_written_by_an_optimizer_or_through_data():
    model = tiny_model("llama")
    sampler = sampler_of(model)
    params = SamplingParams(temperature=0, max_new_tokens=8)
    before = sampler.sample(requests(n=1), params)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
    optimizer.step()
    stepped = sampler.sample(requests(n=1), params)
    assert stepped != before
    assert stepped == sampler_of(model).sample(requests(n=1), params)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    scaled = sampler.sample(requests(n=1), params)
    assert scaled != stepped
    assert scaled == sampler_of(model).sample(requests(n=1), params)


def test_a_model_that_changes_its_dtype_is_followed():
    model = tiny_model("llama")
    sampler = sampler_of(model)
    params = SamplingParams(temperature=0, max_new_tokens=8)
    in_float32 = sampler.sample(requests(n=1), params)
    model.to(torch.bfloat16)
    assert sampler.sample(requests(n=1), params) == sampler_of(model).sample(requests(n=1), params)
    model.to(torch.float32)
    assert sampler.sample(requests(n=1), params) != in_float32  # the weights were rounded


def test_lora_adapters_are_part_of_the_model():
    import peft

    base = tiny_model("llama")
    plain = sampler_of(base).sample(requests(n=1), SamplingParams(temperature=0, max_new_tokens=8))
    lora = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    sampler = sampler_of(lora)
    with_adapter = sampler.sample(requests(n=1), SamplingParams(temperature=0, max_new_tokens=8))
    assert sampler.engine_name == "fused"
    assert [g[0].token_ids for g in with_adapter] != [g[0].token_ids for g in plain]
    recomputed = sampler_of(lora, engine="recompute").sample(
        requests(n=1), SamplingParams(temperature=0, max_new_tokens=8)
    )
    assert [g[0].token_ids for g in with_adapter] == [g[0].token_ids for g in recomputed]
    with lora.disable_adapter():
        without = sampler.sample(requests(n=1), SamplingParams(temperature=0, max_new_tokens=8))
    assert [g[0].token_ids for g in without] == [g[0].token_ids for g in plain]


def test_bfloat16_stays_near_a_full_forward():
    model = tiny_model("llama").to(torch.bfloat16)
    sampler = sampler_of(model)
    for request, answers in zip(requests(), sampler.sample(requests(), SamplingParams(max_new_tokens=9)), strict=True):
        for answer in answers:
            logprobs = full_forward_logprobs(model, request.prompt_ids, answer.token_ids)
            chosen = logprobs.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            assert answer.logprobs == pytest.approx(chosen.tolist(), abs=0.15)
    assert sampler.engine_name == "fused"
