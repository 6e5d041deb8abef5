"""What `InProcessSampler` promises beside its numbers: how answers end, repeatability, the model left as it was."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tutelage.errors import ConfigError, NumericsError, SamplerError
from tutelage.policies.sampler import InProcessSampler, ends_with_stop
from tutelage.types import Sampler, SampleRequest, SamplingParams

STOP = 2


def letters(ids):
    """One letter a token; token 3 is a space, token 4 leaves no text."""
    return "".join("" if i == 4 else " " if i == 3 else chr(ord("a") + i % 26) for i in ids)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=STOP,
    )
    return LlamaForCausalLM(config)


def ask(n=4, lengths=(3, 9, 5), seed=0):
    return [
        SampleRequest(prompt_ids=tuple((5 * i + r) % 60 for i in range(length)), n=n, seed=seed + r)
        for r, length in enumerate(lengths)
    ]


def sampler_of(model, **settings):
    return InProcessSampler(model, **{"stop_ids": [STOP], "decode": letters, "max_batch": 5, **settings})


def ids_of(answers):
    return [[c.token_ids for c in group] for group in answers]


class Steered(nn.Module):
    """Gives the logits of a model, with those of chosen tokens moved: makes endings happen on purpose."""

    def __init__(self, model, token, amount, after=0):
        super().__init__()
        self.inner, self.config = model, model.config
        self.token, self.amount, self.after = token, amount, after

    @property
    def device(self):
        return self.inner.device

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        out = self.inner(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        out.logits = out.logits.clone()
        lengths = (
            torch.full(input_ids.shape[:1], input_ids.shape[1]) if position_ids is None else position_ids[:, -1] + 1
        )
        out.logits[lengths >= self.after, -1, self.token] += self.amount
        return out


def test_it_is_a_sampler(model):
    assert isinstance(sampler_of(model), Sampler)
    assert sampler_of(model, author="teacher", version="v7").author == "teacher"


def test_shapes_lengths_and_endings_agree(model):
    answers = sampler_of(model).sample(ask(n=20), SamplingParams(max_new_tokens=30))
    assert [len(group) for group in answers] == [20, 20, 20]
    endings = set()
    for c in (c for group in answers for c in group):
        assert len(c.token_ids) == len(c.logprobs) == len(c.entropies) <= 30
        assert STOP not in c.token_ids[:-1]
        endings.add(c.finish)
        if c.finish == "stop":
            assert c.token_ids[-1] == STOP
            assert c.text == letters(c.token_ids[:-1])
        else:
            assert c.finish == "length" and len(c.token_ids) == 30 and c.token_ids[-1] != STOP
            assert c.text == letters(c.token_ids)
        assert all(p <= 0 for p in c.logprobs)
        assert all(0 <= h <= torch.tensor(60.0).log().item() + 1e-6 for h in c.entropies)
    assert endings == {"stop", "length"}


def test_a_stop_token_drawn_last_is_a_stop(model):
    certain = Steered(model, STOP, 1e4, after=6)
    answers = sampler_of(certain).sample(ask(n=1, lengths=(3,)), SamplingParams(max_new_tokens=4))
    assert len(answers[0][0].token_ids) == 4
    assert answers[0][0].finish == "stop"
    assert answers[0][0].logprobs[-1] == pytest.approx(0, abs=1e-6)


def test_an_answer_may_be_one_stop_token(model):
    certain = Steered(model, STOP, 1e4)
    answers = sampler_of(certain).sample(ask(n=7), SamplingParams(max_new_tokens=9))
    assert ids_of(answers) == [[(STOP,)] * 7] * 3
    assert {c.text for group in answers for c in group} == {""}


def test_several_stop_tokens(model):
    answers = sampler_of(model, stop_ids=[5, 6, STOP]).sample(ask(n=30), SamplingParams(max_new_tokens=40))
    last = {c.token_ids[-1] for g in answers for c in g if c.finish == "stop"}
    assert last == {5, 6, STOP}
    assert all(not {5, 6, STOP} & set(c.token_ids[:-1]) for g in answers for c in g)


def test_a_stop_string_ends_at_the_token_that_completes_it(model):
    free = sampler_of(model).sample(ask(), SamplingParams(max_new_tokens=30))
    text = max((c.text for g in free for c in g), key=len)
    stop = text[7:10]
    cut = sampler_of(model).sample(ask(), SamplingParams(max_new_tokens=30, stop=(stop,)))
    endings = []
    for before, after in zip((c for g in free for c in g), (c for g in cut for c in g), strict=True):
        if stop in before.text:
            where = next(i for i in range(len(before.token_ids) + 1) if stop in letters(before.token_ids[:i]))
            assert after.token_ids == before.token_ids[:where]
            assert after.finish == "stop_string"
            assert stop in after.text
        else:
            assert after == before
        endings.append(after.finish)
    assert "stop_string" in endings


def test_stop_strings_are_found_across_tokens_and_past_tokens_without_text():
    assert ends_with_stop([10, 11, 12], ["klm"], letters)
    assert not ends_with_stop([10, 11], ["klm"], letters)
    assert ends_with_stop([10, *[4] * 500, 11, 4, 12], ["klm"], letters)
    assert ends_with_stop([7] * 5000 + [10, 11], ["kl", "never"], letters)
    assert not ends_with_stop([7] * 5000 + [10, 12], ["kl"], letters)


def test_equal_requests_give_equal_answers_and_seeds_tell_them_apart(model):
    params = SamplingParams(max_new_tokens=20)
    first = sampler_of(model).sample(ask(), params)
    torch.manual_seed(12345)  # the global generator is not read
    assert sampler_of(model).sample(ask(), params) == first
    assert ids_of(sampler_of(model).sample(ask(seed=100), params)) != ids_of(first)
    assert len(set(ids_of(first)[0])) == 4


def test_the_global_generator_is_left_alone(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sampler_of(model).sample(ask(), SamplingParams(max_new_tokens=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_do_not_depend_on_how_many_are_asked_for(model):
    params = SamplingParams(max_new_tokens=15)
    many = sampler_of(model).sample(ask(n=6), params)
    few = sampler_of(model).sample(ask(n=2), params)
    assert ids_of(few) == [group[:2] for group in ids_of(many)]


@pytest.mark.parametrize("max_batch", [1, 2, 7, 64])
def test_the_batch_size_changes_nothing_in_float32(model, max_batch):
    params = SamplingParams(max_new_tokens=15)
    expected = sampler_of(model).sample(ask(), params)
    got = sampler_of(model, max_batch=max_batch).sample(ask(), params)
    assert ids_of(got) == ids_of(expected)


def test_the_models_own_generation_config_is_not_read(model):
    params = SamplingParams(max_new_tokens=15)
    expected = sampler_of(model).sample(ask(), params)
    config = model.generation_config
    old = config.to_dict()
    config.top_p, config.top_k, config.temperature, config.max_new_tokens = 0.1, 2, 0.2, 1
    config.eos_token_id, config.repetition_penalty, config.do_sample = [7], 5.0, True
    try:
        assert sampler_of(model).sample(ask(), params) == expected
    finally:
        for name, value in old.items():
            setattr(config, name, value)


def test_each_distinct_prompt_is_computed_once(model):
    sampler = sampler_of(model, max_batch=3)
    sampler.sample(ask(), SamplingParams(max_new_tokens=2))
    seen = []
    inner = sampler._engine.prefill
    sampler._engine.prefill = lambda prompts: seen.extend(prompts) or inner(prompts)
    twice = [*ask(n=5), *ask(n=5, seed=50)]
    sampler.sample(twice, SamplingParams(max_new_tokens=6))
    assert sorted(seen) == sorted(r.prompt_ids for r in ask())


def test_training_mode_and_gradients_are_left_as_they_were(model):
    model.train()
    model.model.layers[1].eval()
    sampler_of(model).sample(ask(), SamplingParams(max_new_tokens=3))
    assert model.training and model.model.layers[0].mlp.training and not model.model.layers[1].mlp.training
    model.eval()
    loss = model(torch.tensor([[1, 5, 6]]), labels=torch.tensor([[1, 5, 6]])).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


def test_dropout_is_off_while_sampling():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.5)
    gpt2 = GPT2LMHeadModel(config).train()
    params = SamplingParams(temperature=0, max_new_tokens=10)
    assert sampler_of(gpt2).sample(ask(), params) == sampler_of(gpt2).sample(ask(), params)


def test_the_context_ends_an_answer_as_length(model):
    answers = sampler_of(model).sample(ask(n=3, lengths=(60, 63)), SamplingParams(max_new_tokens=50))
    for group, room in zip(answers, (4, 1), strict=True):
        for c in group:
            assert len(c.token_ids) <= room
            assert c.finish == ("stop" if c.token_ids[-1] == STOP else "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [((), "at least one token"), ((1, 60), "vocabulary of 60"), ((-1,), "vocabulary"), ((1,) * 64, "64 positions")],
)
def test_prompts_that_cannot_be_continued_are_named(model, prompt, message):
    good = SampleRequest(prompt_ids=(1, 5), n=1, seed=0)
    with pytest.raises(SamplerError, match=message) as caught:
        sampler_of(model).sample([good, SampleRequest(prompt_ids=prompt, n=1, seed=0)], SamplingParams())
    assert "request 1 of 2" in str(caught.value)


def test_settings_out_of_range_are_all_named(model):
    params = SamplingParams(temperature=-1, top_p=0, max_new_tokens=0, stop=("",))
    with pytest.raises(ConfigError) as caught:
        sampler_of(model).sample(ask(), params)
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError) as caught:
        sampler_of(model, max_batch=0, engine="warp", prefill_tokens=0)
    assert len(caught.value.problems) == 3


def test_nothing_asked_nothing_answered(model):
    assert sampler_of(model).sample([], SamplingParams()) == []
    assert sampler_of(model).sample([SampleRequest(prompt_ids=(1,), n=0, seed=0)], SamplingParams()) == [[]]


def test_damaged_weights_are_an_error_and_the_sampler_recovers(model):
    sampler = sampler_of(model)
    params = SamplingParams(max_new_tokens=8)
    expected = sampler.sample(ask(), params)
    with torch.no_grad():
        kept = model.model.norm.weight.clone()
        model.model.norm.weight[0] = float("nan")
        with pytest.raises(NumericsError):
            sampler.sample(ask(), params)
        model.model.norm.weight.copy_(kept)
    assert sampler.sample(ask(), params) == expected


def test_an_engine_that_differs_is_not_used_and_the_reason_is_kept(model, monkeypatch):
    from tutelage.policies import fused_decode

    right = fused_decode.rms_norm
    monkeypatch.setattr(fused_decode, "rms_norm", lambda x, weight, eps: right(x, weight, eps) * 1.01)
    sampler = sampler_of(model)
    expected = sampler_of(model, engine="plain").sample(ask(), SamplingParams(max_new_tokens=8))
    assert sampler.sample(ask(), SamplingParams(max_new_tokens=8)) == expected
    assert sampler.engine_name == "plain"
    assert len(sampler.engine_notes) == 1 and "fused" in sampler.engine_notes[0]
    with pytest.raises(SamplerError, match="differs from a plain forward"):
        sampler_of(model, engine="fused").sample(ask(), SamplingParams())


def test_progress_counts_every_completion(model):
    class Counted:
        def __init__(self):
            self.calls = []

        def start(self, what, total, unit):
            self.calls.append(("start", total, unit))

        def advance(self, amount=1, **numbers):
            self.calls.append(("advance", amount))

        def finish(self):
            self.calls.append(("finish",))

    progress = Counted()
    sampler_of(model).sample(ask(n=6), SamplingParams(max_new_tokens=12), progress=progress)
    assert progress.calls[0] == ("start", 18, "completions")
    assert progress.calls[-1] == ("finish",)
    assert sum(c[1] for c in progress.calls if c[0] == "advance") == 18
