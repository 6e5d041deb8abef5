"""Teachers on transformers models: scores, averages, mixtures, and whether they fit the student."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from tutelage.data.collate import collate
from tutelage.errors import CheckpointError, ConfigError, DataError, MissingExtra
from tutelage.policies.policy import Policy, add_lora
from tutelage.policies.sampler import InProcessSampler
from tutelage.policies.teacher_mixed import MixtureEngine, TeacherMixedSampler
from tutelage.policies.teachers import (
    AveragedTeacher,
    InProcessTeacher,
    SelfTeacher,
    check_stop_ids,
    check_vocabulary,
    load_teacher,
    top_k_of,
)
from tutelage.types import SampleRequest, SamplingParams, Span, TargetRow, Trajectory

VOCAB = 60


def tiny(seed=0, width=16, vocab=VOCAB, inner=24, **extra):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    return model


def trajectory(prompt, answer, at="t"):
    spans = (
        Span(token_ids=tuple(prompt), role="user", author="user"),
        Span(token_ids=tuple(answer), role="assistant", author="student", is_sampled=True, is_trainable=True),
    )
    return Trajectory(id=at, task_id="q", task_hash="q", spans=spans)


def some():
    return [trajectory(range(3, 5 + i), range(20, 23 + 2 * i), f"t{i}") for i in range(4)]


@torch.no_grad()
def plain_logits(model, t):
    out = model(input_ids=torch.tensor([t.token_ids])).logits[0]
    return out[[i - 1 for i, hit in enumerate(t.is_target) if hit]]


@pytest.mark.parametrize("max_tokens", [8, 4096])
def test_scores_are_the_models_own_whatever_the_batching(max_tokens):
    model = tiny()
    teacher = InProcessTeacher(model, max_tokens=max_tokens)
    empty = replace(some()[0], spans=(some()[0].spans[0],))
    ts = [some()[0], empty, *some()[1:]]
    scores = teacher.score(ts)
    assert scores[1] == [] and teacher.num_scored_tokens > 0
    for t, got in zip(ts, scores, strict=True):
        if t.num_targets:
            ids = torch.tensor(t.spans[1].token_ids)
            want = plain_logits(model, t).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(torch.tensor(got), want, rtol=1e-5, atol=1e-5)
    half = teacher.score(ts, temperature=[np.full(t.num_targets, 2.0) for t in ts])
    ids = torch.tensor(ts[0].spans[1].token_ids)
    want = (plain_logits(model, ts[0]) / 2).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.tensor(half[0]), want, rtol=1e-5, atol=1e-5)


def test_the_teacher_is_frozen_and_in_evaluation_mode():
    model = tiny().train()
    teacher = InProcessTeacher(model)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    batch = collate([TargetRow(trajectory=some()[0], columns={"weight_C": np.ones(3)}, count=1)])
    assert not teacher.hidden(batch).requires_grad and not teacher.output_layer.weight_VD.requires_grad


def test_top_k_is_exact_and_its_tail_is_summed_not_subtracted():
    model = tiny()
    (top,) = InProcessTeacher(model).top_k([some()[0]], 5)
    lp = plain_logits(model, some()[0]).log_softmax(-1)
    torch.testing.assert_close(torch.tensor(top.logprobs), lp.topk(5).values, rtol=1e-5, atol=1e-5)
    assert np.array_equal(top.ids, lp.topk(5).indices.numpy())
    np.testing.assert_allclose(np.exp(top.logprobs).sum(-1) + np.exp(top.tail), 1, rtol=1e-5)
    whole = top_k_of(lp, 999)
    assert whole.ids.shape[1] == VOCAB and (whole.tail == -np.inf).all()
    tiny_tail = top_k_of(torch.tensor([[0.0, -60.0, -61.0]]), 1)
    assert tiny_tail.tail[0] == pytest.approx(-60 + math.log1p(math.exp(-1)), rel=1e-5)


def test_ids_the_teacher_does_not_have_are_named():
    teacher = InProcessTeacher(tiny(), vocab_size=30)
    assert teacher.output_layer.weight_VD.shape[0] == 30
    with pytest.raises(DataError, match=r"token id 31.*below 30"):
        teacher.score([trajectory([3], [31])])


def test_a_self_teacher_does_not_change_the_policys_mode_and_base_is_without_adapters():
    model = tiny()
    lora = add_lora(model, r=2, alpha=4, dropout=0.5, target="all-linear", seed=0)
    policy = Policy(lora)
    t = some()[1]
    before = plain_logits(lora, t)
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    policy.train()
    moved = plain_logits(lora.eval(), t)
    policy.train()
    ids = torch.tensor(t.spans[1].token_ids).unsqueeze(-1)
    for weights, want in (("current", moved), ("base", before)):
        teacher = SelfTeacher(policy, weights=weights)
        got = torch.tensor(teacher.score([t])[0])
        torch.testing.assert_close(got, want.log_softmax(-1).gather(-1, ids).squeeze(-1), rtol=1e-4, atol=1e-4)
        assert policy.training and teacher.is_fixed == (weights == "base")
    assert (moved - before).abs().max() > 0.1
    with pytest.raises(ConfigError, match="LoRA"):
        SelfTeacher(Policy(tiny()), weights="base")


def test_an_averaged_teacher_uses_its_average_and_leaves_the_policy_alone(tmp_path):
    policy = Policy(tiny(3))
    start = {n: p.detach().clone() for n, p in policy.named_parameters()}
    teacher = AveragedTeacher(policy, decay=0.5)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(0.8)
    moved = {n: p.detach().clone() for n, p in policy.named_parameters()}
    teacher.after_step(policy)
    halfway = tiny(3)
    with torch.no_grad():
        for n, p in halfway.named_parameters():
            p.copy_((start[f"model.{n}"] + moved[f"model.{n}"]) / 2)
    t = some()[2]
    torch.testing.assert_close(
        torch.tensor(teacher.score([t])[0]),
        torch.tensor(InProcessTeacher(halfway).score([t])[0]),
        rtol=1e-4,
        atol=1e-5,
    )
    assert all(torch.equal(p, moved[n]) for n, p in policy.named_parameters())
    teacher.save(tmp_path)
    other = AveragedTeacher(policy, decay=0.5)
    assert other.score([t]) != teacher.score([t])
    other.load(tmp_path)
    assert other.score([t]) == teacher.score([t])
    with pytest.raises(CheckpointError, match="missing"):
        other.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="other parameters"):
        AveragedTeacher(Policy(tiny(attention_bias=True))).load(tmp_path)
    with pytest.raises(ConfigError, match="decay"):
        AveragedTeacher(policy, decay=1.0)


# -- mixtures -------------------------------------------------------------------------------------------------------


def sampler(kind, *args, **kwargs):
    options = {"stop_ids": [2], "decode": lambda ids: " ".join(map(str, ids)), "max_batch": 3, **kwargs}
    return kind(*args, **options)


def requests():
    return [SampleRequest(prompt_ids=tuple(range(3, 5 + r)), n=2, seed=r) for r in range(4)]


@pytest.mark.parametrize("engine", ["plain", "recompute"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixed_draws_logprobs_are_the_mixtures(share, engine):
    student, teacher = tiny(1), tiny(2, width=8, vocab=VOCAB + 4)
    mixed = sampler(TeacherMixedSampler, student, teacher, share=share, engine=engine)
    params = SamplingParams(max_new_tokens=7)
    answers = mixed.sample(requests(), params)
    assert mixed.author == "mixed"
    for request, completions in zip(requests(), answers, strict=True):
        for c in completions:
            t = trajectory(request.prompt_ids, c.token_ids)
            q = plain_logits(student, t).softmax(-1)
            p = plain_logits(teacher, t)[:, :VOCAB].softmax(-1)
            want = (share * p + (1 - share) * q)[range(len(c.token_ids)), list(c.token_ids)].log()
            torch.testing.assert_close(torch.tensor(c.logprobs), want, rtol=1e-3, atol=1e-3)
    if share == 0.0:
        alone = sampler(InProcessSampler, student, engine=engine).sample(requests(), params)
        assert [[c.token_ids for c in cs] for cs in alone] == [[c.token_ids for c in cs] for cs in answers]


def test_a_mixture_at_another_temperature_is_refused():
    mixed = sampler(TeacherMixedSampler, tiny(1), tiny(2))
    with pytest.raises(ConfigError, match=r"temperature 0\.5"):
        mixed.sample(requests(), SamplingParams(temperature=0.5))
    with pytest.raises(ConfigError, match="share must be"):
        sampler(TeacherMixedSampler, tiny(1), tiny(2), share=1.5)


class Rows:
    """An engine whose logits say which rows it holds, in an order of its own."""

    name = "rows"

    def __init__(self, reverse):
        self.reverse, self.rows = reverse, []

    def prefill(self, prompts):
        return torch.eye(9)[[p[0] for p in prompts]], [[p[0]] for p in prompts]

    def recompose(self, leaving, joining):
        order = [i for i in range(len(self.rows)) if i not in leaving] + [-1 - j for j in range(len(joining))]
        order = order[::-1] if self.reverse else order
        self.rows = [list(self.rows[i]) if i >= 0 else list(joining[-1 - i]) for i in order]
        return order

    def step(self, tokens):
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        return torch.eye(9)[[sum(row) % 9 for row in self.rows]] * 50


def test_engines_that_order_rows_differently_are_kept_in_step():
    student, teacher = Rows(False), Rows(True)
    engine = MixtureEngine(student, teacher, 0.5)
    _, states = engine.prefill([[1], [2], [3]])
    order = engine.recompose([], states)
    assert order == [-1, -2, -3]
    log_mix = engine.step([4, 1, 3])
    assert log_mix.exp().argmax(-1).tolist() == [5, 3, 6] and (log_mix.exp().max(-1).values > 0.99).all()
    _, more = engine.prefill([[7]])
    order = engine.recompose([1], more)
    assert order == [0, 2, -1]
    assert engine.step([1, 1, 1]).exp().max(-1).indices.tolist() == [6, 7, 8]
    assert [sorted(r) for r in teacher.rows[::-1]] == [sorted(r) for r in student.rows] or (
        sorted(map(tuple, teacher.rows)) == sorted(map(tuple, student.rows))
    )


# -- does it fit ----------------------------------------------------------------------------------------------------


def tokenizer(tokens, added=()):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    out = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    out.add_special_tokens({"additional_special_tokens": list(added)})
    return out


WORDS = ["<unk>", "The", "quick", "brown", "fox", "def", "x", "(", ")", ":"]


def test_vocabularies_are_compared_by_content():
    same = tokenizer(WORDS), tokenizer(WORDS)
    assert check_vocabulary(*same, student_width=12, teacher_width=12) is None
    assert check_vocabulary(*same, student_width=12, teacher_width=16) == 12
    assert check_vocabulary(*same, student_width=16, teacher_width=12) == 12
    more = tokenizer(WORDS), tokenizer(WORDS, added=["<tool>"])
    assert check_vocabulary(*more, student_width=16, teacher_width=16) is None
    swapped = tokenizer([WORDS[0], *WORDS[:0:-1]])
    with pytest.raises(ConfigError, match="sequence-level distillation"):
        check_vocabulary(tokenizer(WORDS), swapped, student_width=16, teacher_width=16)
    with pytest.raises(ConfigError, match=r"only 8 entries"):
        check_vocabulary(*same, student_width=16, teacher_width=8)


def test_different_end_of_turn_ids_are_detected():
    check_stop_ids([7, 5], [7])
    check_stop_ids([7], [7, 5])
    check_stop_ids([151645, 151643], [151645])
    for theirs in ([151645], [151645, 151643]):  # Qwen2.5's base and instruct generation configs
        with pytest.raises(ConfigError, match=r"\[151643\].*\[151645"):
            check_stop_ids([151643], theirs)


def test_a_quantised_teacher_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("tutelage.policies.load.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'tutelage\[quantised\]'"):
        load_teacher("smollm2-135m-instruct", quantise="4bit")
    with pytest.raises(ConfigError, match="3bit"):
        load_teacher("smollm2-135m-instruct", quantise="3bit")


@pytest.mark.parametrize(("quantise", "kind", "most"), [("8bit", "Linear8bitLt", 1e-3), ("4bit", "Linear4bit", 0.1)])
def test_a_quantised_teacher_is_near_the_whole_one(tmp_path, quantise, kind, most):
    """Through bitsandbytes itself: layers in 8 or 4 bits, output layer whole, and the KL that this costs."""
    model = tiny(width=64, inner=128)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), dtype="bfloat16", quantise=quantise)
    assert type(teacher.policy.causal_model.model.layers[0].mlp.up_proj).__name__ == kind
    assert teacher.policy.output_layer.weight_VD.dtype == torch.bfloat16
    batch = collate([TargetRow(trajectory=some()[0], columns={"weight_C": np.ones(3)}, count=1)])
    own, other = (
        (t.hidden(batch).float() @ t.output_layer.weight_VD.float().T).log_softmax(-1)
        for t in (InProcessTeacher(model.bfloat16()), teacher)
    )
    divergence = (own.exp() * (own - other)).sum(-1)
    assert 0 < divergence.mean() < most


def test_a_saved_model_is_loaded_as_a_teacher(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), dtype="float32", name="big", max_tokens=99)
    assert (teacher.name, teacher.max_tokens) == ("big", 99)
    assert teacher.score(some()) == InProcessTeacher(model).score(some())
