"""Packed rows: every document's hidden states are those it has alone, for each architecture and way of attending."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tutelage.policies import packed_attention
from tutelage.policies.policy import Policy

torch.set_num_threads(1)
COMMON = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "mistral, window 5": MistralConfig(**COMMON, sliding_window=5),
}


@dataclasses.dataclass
class Packed:
    token_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    cu_seqlens: torch.Tensor | None
    attention_mask_BT: torch.Tensor | None = None


def packed(documents: list[torch.Tensor]) -> Packed:
    bounds = torch.tensor([0, *torch.tensor([len(d) for d in documents]).cumsum(0).tolist()], dtype=torch.int32)
    position = torch.cat([torch.arange(len(d)) for d in documents])
    return Packed(torch.cat(documents)[None], position[None], bounds)


@pytest.mark.parametrize("way", ["kernel", "products", "together"])
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_do_not_see_each_other(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "choose_way", lambda query, lengths: way)
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float64)).eval()
    documents = [torch.randint(0, 40, (n,)) for n in (7, 1, 12, 3)]
    together = policy.hidden_states(packed(documents))[0]
    policy.use_plain_attention()
    body = policy.causal_model.base_model
    alone = torch.cat([body(d[None], use_cache=False).last_hidden_state[0] for d in documents])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", ["kernel", "products", "together"])
def test_gradients_are_those_of_the_documents_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "choose_way", lambda query, lengths: way)
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float64))
    documents = [torch.randint(0, 40, (n,)) for n in (7, 1, 12, 3)]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        policy.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    together = gradients(policy.hidden_states(packed(documents)).pow(2).sum())
    policy.use_plain_attention()
    body = policy.causal_model.base_model
    alone = gradients(sum(body(d[None], use_cache=False).last_hidden_state.pow(2).sum() for d in documents))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_bfloat16_ways_agree_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents on both sides of the limit: each way is as near to float64 as bfloat16 allows."""
    monkeypatch.setattr(packed_attention, "PRODUCTS", 12)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 43, 8, dtype=torch.float64) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 12, 42, 43], dtype=torch.int32)

    def attended(dtype: torch.dtype) -> list[torch.Tensor]:
        given = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]
        mixed, _ = packed_attention.packed_attention(torch.nn.Module(), *given, None, 0.3, cu_seq_lens_q=bounds)
        mixed.square().sum().backward()
        return [mixed.detach().double(), *[x.grad.double() for x in given if x.grad is not None]]

    exact, products = attended(torch.float64), attended(torch.bfloat16)
    monkeypatch.setattr(packed_attention, "choose_way", lambda query, lengths: "kernel")
    for a, b, c in zip(exact, products, attended(torch.bfloat16), strict=True):
        assert (a - b).norm() < 0.02 * a.norm()
        assert (a - b).norm() < 2 * (a - c).norm()


def test_products_are_for_training_in_bfloat16() -> None:
    query = torch.zeros(1, 1, 4, 2, dtype=torch.bfloat16, requires_grad=True)
    assert packed_attention.choose_way(query, [4]) == "products"
    assert packed_attention.choose_way(query.detach(), [4]) == "kernel"
    assert packed_attention.choose_way(query.float(), [4]) == "kernel"
    with torch.no_grad():
        assert packed_attention.choose_way(query, [4]) == "kernel"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_at_the_start_of_a_run_sees_documents_that_see_each_other(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tutelage.data.collate import collate
    from tutelage.errors import NumericsError
    from tutelage.methods.job import TOLERANCE, _probe_row
    from tutelage.policies.policy import check_forward
    from tutelage.testing.tiny import tiny_model, tiny_tokenizer
    from tutelage.text import ChatText

    text = ChatText(tiny_tokenizer())
    policy = Policy(tiny_model(dtype=dtype))
    rows = [_probe_row(text, i) for i in range(3)]
    batches = {"plain": collate(rows, layout="padded"), "packed": collate(rows, layout="packed")}
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    assert check_forward(policy, batches, tolerance=tolerance) < tolerance
    packed = batches["packed"]
    leaking = dataclasses.replace(packed, cu_seqlens=packed.cu_seqlens[[0, -1]])
    with pytest.raises(NumericsError, match=r"in the packed layout they differ by .* standard deviations.*padded"):
        check_forward(policy, {**batches, "packed": leaking}, tolerance=tolerance)


def qwen(**more: object) -> Policy:
    """Of a family whose attention has no form of ours: it goes through `packed_attention`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=258, pad_token_id=256, initializer_range=0.2, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return Policy(Qwen3ForCausalLM(config).bfloat16())


def test_the_check_at_the_start_of_a_run_attends_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.data.collate import collate
    from tutelage.errors import NumericsError
    from tutelage.methods.job import TOLERANCE, _probe_row
    from tutelage.policies.policy import check_forward
    from tutelage.testing.tiny import tiny_tokenizer
    from tutelage.text import ChatText

    text = ChatText(tiny_tokenizer())
    rows = [_probe_row(text, i) for i in range(3)]
    batches = {"plain": collate(rows, layout="padded"), "packed": collate(rows, layout="packed")}
    policy = qwen()
    assert check_forward(policy, batches, tolerance=TOLERANCE["bfloat16"]) < TOLERANCE["bfloat16"]
    right = packed_attention._by_products
    monkeypatch.setattr(packed_attention, "_by_products", lambda q, k, v, *more: right(q, k.flip(2), v, *more))
    with pytest.raises(NumericsError, match="in the packed layout they differ"):
        check_forward(policy, batches, tolerance=TOLERANCE["bfloat16"])


def test_a_document_is_long_enough_to_tell_where_it_exceeds_what_short_ones_show() -> None:
    assert packed_attention.telling_length(qwen(max_position_embeddings=4096).causal_model.config) == 520
    assert packed_attention.telling_length(qwen(max_position_embeddings=512).causal_model.config) is None
    window = {"use_sliding_window": True, "max_window_layers": 0}
    for size, length in ((600, 608), (100, 520), (4096, 520)):
        config = qwen(max_position_embeddings=8192, sliding_window=size, **window).causal_model.config
        assert packed_attention.telling_length(config) == length
    small = qwen(max_position_embeddings=256, sliding_window=100, **window).causal_model.config
    assert packed_attention.telling_length(small) == 256
