"""The ledger of operations, against torch's own count of a model's matrix products."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tutelage.errors import ConfigError
from tutelage.train.ledger import Ledger, ModelCost, cost_of
from tutelage.types import Span, Trajectory


def llama(**extra):
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **extra,
    )
    return transformers.LlamaForCausalLM(config)


def trajectory(prompt, answer):
    spans = (
        Span(token_ids=(1,) * prompt, role="user", author="user"),
        Span(token_ids=(2,) * answer, role="assistant", author="student", is_sampled=True, is_trainable=True),
    )
    return Trajectory(id="t", task_id="q", task_hash="q", spans=spans)


def counted(model, length, *, backward):
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=False).logits
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [False, True])
def test_forward_and_training_costs_are_the_models_matrix_products(tied):
    model = llama(tie_word_embeddings=tied)
    cost = cost_of(model)
    no_attention = ModelCost(body=cost.body, attention=0.0, head=cost.head)
    n = 7
    linear = counted(model, n, backward=False)
    assert no_attention.forward(n) <= linear * 1.001
    # torch counts attention over all pairs or not at all, by kernel; ours counts the causal half.
    pairs = n * n * cost.attention
    assert linear == pytest.approx(no_attention.forward(n), rel=1e-6) or linear == pytest.approx(
        no_attention.forward(n) + pairs, rel=1e-6
    )
    trained = counted(model, n, backward=True)
    assert trained / linear == pytest.approx(3.0, rel=0.2)
    assert cost.training(n, heads=n) == pytest.approx(3 * cost.forward(n), rel=1e-9)


def test_attention_is_counted_over_the_past_only():
    cost = ModelCost(body=0.0, attention=1.0, head=0.0)
    assert cost.forward(4) == 1 + 2 + 3 + 4 == cost.forward(2) + cost.forward(4, start=2)


def test_a_step_splits_into_sampling_teacher_and_training():
    small, big = ModelCost(body=10.0, attention=0.0, head=1.0), ModelCost(body=100.0, attention=0.0, head=2.0)
    ledger = Ledger()
    ts = [trajectory(4, 3), trajectory(4, 3)]
    ledger.sampled(small, ts, prompt_shared=2)
    ledger.scored("teacher", big, ts)
    ledger.trained(small, ts)
    # a prompt of 4 once for two samples; 3 sampled tokens each, with logits at these
    assert ledger.flops["sampling"] == 4 * 10 + 2 * (3 * 10 + 3 * 1)
    assert ledger.flops["teacher"] == 2 * (6 * 100 + 3 * 2)
    assert ledger.flops["training"] == 2 * 3 * (6 * 10 + 3 * 1)
    assert ledger.tokens == {"sampling": 6, "teacher": 6, "scoring": 0, "training": 6}
    metrics = ledger.metrics()
    assert metrics["compute/total_flops"] == ledger.total == sum(ledger.flops.values())
    assert sum(v for k, v in metrics.items() if k.startswith("compute/frac_")) == pytest.approx(1.0)
    other = Ledger()
    other.restore(ledger.state())
    other.scored("scoring", small, ts[:1])
    assert other.total == ledger.total + 6 * 10 + 3
    with pytest.raises(ConfigError, match="student"):
        ledger.scored("student", small, ts)


def test_lora_saves_the_gradient_of_the_frozen_weights():
    full = cost_of(llama())
    lora = cost_of(llama(), trained_share=0.01)
    assert 0.6 < lora.training(9, heads=9) / full.training(9, heads=9) < 0.75


def test_a_config_without_sizes_is_refused():
    with pytest.raises(ConfigError, match="hidden_size"):
        cost_of(type("C", (), {})())
