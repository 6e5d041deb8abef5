"""The cheaper forms of norms, MLPs and attention: the same values and gradients as the model's own, or not used."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tutelage.policies import fused_layers
from tutelage.policies.fused_layers import DocumentAttention, FusedLayers, GatedMLP, RMSNorm
from tutelage.policies.policy import Policy, add_lora

torch.set_num_threads(1)
SHAPE = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
CONFIGS: dict[str, tuple[Any, int]] = {  # and how many of its modules are swapped
    "llama": (LlamaConfig(**SHAPE), 9),
    "qwen2, biases": (Qwen2Config(**SHAPE), 9),
    "mistral, no window": (MistralConfig(**SHAPE, sliding_window=None), 9),
    "mistral, window 5": (MistralConfig(**SHAPE, sliding_window=5), 9),
    "qwen3, its attention left alone": (Qwen3Config(**SHAPE, head_dim=8), 11),
    "gemma, nothing swapped": (GemmaConfig(**SHAPE, head_dim=8), 0),
    "llama, gelu and biases": (LlamaConfig(**SHAPE, hidden_act="gelu", attention_bias=True, mlp_bias=True), 7),
}
LENGTHS = (7, 1, 12, 3)


@dataclasses.dataclass
class Packed:
    token_ids_BT: Tensor
    position_ids_BT: Tensor
    cu_seqlens: Tensor
    attention_mask_BT: None = None


def packed(seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (1, sum(LENGTHS)), generator=generator)
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    return Packed(ids, torch.cat([torch.arange(n) for n in LENGTHS])[None], bounds)


def model_of(config: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def outputs(policy: Policy, batch: Packed, layers: FusedLayers | None) -> list[Tensor]:
    """Hidden states, and the gradient of every weight of a sum that is not linear in them."""
    policy.zero_grad()
    if layers is None:
        hidden = policy.hidden_states(batch)
    else:
        with layers.swapped():
            hidden = policy.hidden_states(batch)
    hidden.sin().sum().backward()
    return [hidden.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)]


# -- the formulas -------------------------------------------------------------------------------


def norm_by_hand(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()


def mlp_by_hand(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two documents of 3 and 4 tokens; 4 query heads of width 6 over 2 key heads."""
    position = torch.cat([torch.arange(3), torch.arange(4)]).double()
    angle = position[:, None, None] / torch.tensor([1.0, 3.0, 9.0]).double()
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    sees = (document[:, None] == document) & (torch.arange(7)[:, None] >= torch.arange(7))

    def rotated(x: Tensor) -> Tensor:
        a, b = x.unflatten(1, (-1, 6)).chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    q, k = rotated(query), rotated(key).repeat_interleave(2, 1)
    v = value.unflatten(1, (-1, 6)).repeat_interleave(2, 1)
    scores = torch.einsum("qhe,khe->hqk", q, k) * 0.4
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights, v).flatten(1)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Any:
    position = torch.cat([torch.arange(3), torch.arange(4)]).double()
    angle = (position[:, None] / torch.tensor([1.0, 3.0, 9.0]).double()).repeat(1, 2)
    return DocumentAttention.apply(query, key, value, angle.cos(), angle.sin(), (0, 3, 7), 0.4)


FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]] = {
    "norm": (lambda x, w: RMSNorm.apply(x, w, 1e-3), norm_by_hand, [(2, 5, 6), (6,)]),
    "mlp": (GatedMLP.apply, mlp_by_hand, [(2, 5, 6), (8, 6), (8, 6), (6, 8)]),
    "attention": (attention, attention_by_hand, [(7, 24), (7, 12), (7, 12)]),
}


@pytest.mark.parametrize("slice_elements", [1, 12, 1 << 17])
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_are_the_formulas(name: str, slice_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 against autograd of the formula written out, whatever the slices."""
    monkeypatch.setattr(fused_layers, "_SLICE_ELEMENTS", slice_elements)
    ours, by_hand, shapes = FORMULAS[name]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    got, expected = ours(*inputs), by_hand(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    factor = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((got * factor).sum(), inputs),
        torch.autograd.grad((expected * factor).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_frozen_weights_get_no_gradient() -> None:
    x = torch.randn(3, 6).requires_grad_()
    weights = [torch.randn(8, 6), torch.randn(8, 6), torch.randn(6, 8), torch.ones(6)]
    (RMSNorm.apply(x, weights[3], 1e-6).sum() + GatedMLP.apply(x, *weights[:3]).sum()).backward()  # type: ignore
    assert x.grad is not None and all(w.grad is None for w in weights)


def test_the_norm_rounds_where_the_models_own_does() -> None:
    """In bfloat16 its forward is the plain one's to the bit, and its backward no further from float64."""
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64).bfloat16()
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(300, 64).bfloat16().requires_grad_()
    factor = torch.randn(300, 64).bfloat16()
    exact = x.detach().double().requires_grad_()
    norm_by_hand_grad = torch.autograd.grad(
        (norm.weight.double() * exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * factor).sum(), exact
    )[0]
    plain, ours = norm(x), RMSNorm.apply(x, norm.weight, 1e-6)
    assert torch.equal(plain, ours)  # type: ignore[arg-type]
    errors = [float((torch.autograd.grad((y * factor).sum(), x)[0] - norm_by_hand_grad).norm()) for y in (plain, ours)]
    assert errors[1] <= errors[0]


# -- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [512, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_give_the_same_hidden_states_and_gradients(
    name: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with every document within the limit of the products, and with longer ones (the plain attention)."""
    monkeypatch.setattr(fused_layers, "PRODUCTS", longest)
    config, count = CONFIGS[name]
    policy = Policy(model_of(config, torch.float32))
    layers = FusedLayers(policy.model)
    assert len(layers.forwards) == count
    for ours, own in zip(outputs(policy, packed(), layers), outputs(policy, packed(), None), strict=True):
        torch.testing.assert_close(ours, own, rtol=2e-4, atol=2e-4 * float(own.abs().max()))


@pytest.mark.parametrize("name", ["llama", "qwen2, biases", "mistral, no window"])
def test_bfloat16_is_as_near_to_float64_as_the_models_own(name: str) -> None:
    low = Policy(model_of(CONFIGS[name][0], torch.bfloat16))
    full = Policy(copy.deepcopy(low.model).double())
    errors = {}
    exact = outputs(full, packed(), None)
    for is_fused in (True, False):
        low.fused_layers = is_fused
        got = outputs(low, packed(), None)
        errors[is_fused] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
    assert low._fused is not None and len(low._fused.forwards) == 9
    assert sum(errors[True]) <= 1.15 * sum(errors[False])
    assert errors[True] != errors[False]  # they are not the same code


def test_documents_do_not_see_each_other() -> None:
    policy = Policy(model_of(CONFIGS["llama"][0], torch.bfloat16))
    batch = packed()
    first = policy.hidden_states(batch)[0, LENGTHS[0] :]
    batch.token_ids_BT[:, : LENGTHS[0]] = (batch.token_ids_BT[:, : LENGTHS[0]] + 1) % 40
    assert torch.equal(policy.hidden_states(batch)[0, LENGTHS[0] :], first)


def test_adapters_train_through_them() -> None:
    """LoRA's own linear layers stay: the MLP is left alone, and attention goes through the adapters."""
    model = add_lora(model_of(CONFIGS["llama"][0], torch.float32), r=2, alpha=4, dropout=0, target="all-linear", seed=0)
    for parameter in model.parameters():  # B starts at 0
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    policy = Policy(model)
    layers = FusedLayers(policy.model)
    assert len(layers.forwards) == 7
    for ours, own in zip(outputs(policy, packed(), layers), outputs(policy, packed(), None), strict=True):
        torch.testing.assert_close(ours, own, rtol=2e-4, atol=2e-4 * float(own.abs().max()))


# -- when they are used -------------------------------------------------------------------------


class CentredRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class DetachedRMSNorm(LlamaRMSNorm):
    """The formula's value, another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt().detach()


def test_modules_that_compute_something_else_are_left_alone() -> None:
    gated = LlamaMLP(LlamaConfig(**SHAPE))
    relu = LlamaMLP(LlamaConfig(**SHAPE, hidden_act="relu"))
    biased = LlamaMLP(LlamaConfig(**SHAPE, mlp_bias=True))
    modules = [LlamaRMSNorm(8), gated, GemmaRMSNorm(8), CentredRMSNorm(8), DetachedRMSNorm(8), relu, biased]
    assert [len(FusedLayers(m).forwards) for m in modules] == [1, 1, 0, 0, 0, 0, 0]


def test_somebody_elses_forward_is_left_alone() -> None:
    norm = LlamaRMSNorm(8)
    norm.forward = own = lambda x: x  # type: ignore[method-assign,assignment]
    with FusedLayers(nn.Sequential(norm, LlamaRMSNorm(8))).swapped():
        assert norm.forward is own


def test_they_are_in_place_only_inside() -> None:
    policy = Policy(model_of(CONFIGS["llama"][0], torch.bfloat16))
    with pytest.raises(AttributeError):
        policy.hidden_states(None)  # type: ignore[arg-type]
    bad = packed()
    bad.token_ids_BT = bad.token_ids_BT + 1000
    with pytest.raises(IndexError):
        policy.hidden_states(bad)
    assert policy._fused is not None
    assert not any("forward" in vars(m) for m in policy.modules())
    other = copy.deepcopy(policy.model)
    with policy._fused.swapped():
        assert sum("forward" in vars(m) for m in policy.modules()) == 9
        assert not any("forward" in vars(m) for m in other.modules())


@pytest.mark.parametrize("reason", ["float32", "switched off", "checkpointed"])
def test_they_are_not_used(reason: str) -> None:
    dtype = torch.float32 if reason == "float32" else torch.bfloat16
    policy = Policy(model_of(CONFIGS["llama"][0], dtype), fused_layers=reason != "switched off")
    if reason == "checkpointed":
        policy.model.gradient_checkpointing_enable()
        policy.train()
    policy.hidden_states(packed()).sum().backward()
    assert policy._fused is None
