"""Ratio and clip metrics of a step against values worked out by hand; plumbing does not change them."""

import itertools
import math

import pytest
import torch
from test_signals_policy_gradient import PROMPT, V, completion, definition, drawn, trainer_of

from tutelage.policies.table import TablePolicy
from tutelage.signals.policy_gradient import PolicyGradient
from tutelage.signals.ratio_stats import NAMES, RatioStats, ratio_metrics
from tutelage.train.trainer import TrainerSettings

torch.set_num_threads(1)
IDS, REWARDS = [(0, 1), (1, 2), (2, 2), (0, 0)], [1.0, 0.0, 1.0, 1.0]
OFF = [(0.2, -1.0), (0.9, 0.0), (-0.5, 1.4), (0.0, 0.0)]


def per_token(table: torch.Tensor) -> list[list[float]]:
    logp = table.detach().log_softmax(0)
    return [[float(logp[b, a]) for a, b in itertools.pairwise((PROMPT, *c))] for c in IDS]


def metrics(clip: tuple[float, float] | None, cap: float | None, *, max_tokens: int = 64) -> dict[str, float]:
    sampled, now = TablePolicy(V, seed=2), TablePolicy(V, seed=7)
    old = per_token(sampled.table_VD)
    group = [
        completion(c, r, behaviour=[x - o for x, o in zip(lp, off, strict=True)])
        for c, r, lp, off in zip(IDS, REWARDS, old, OFF, strict=True)
    ]
    signal = PolicyGradient("grpo", clip=clip, sampler_cap=cap)
    targets = signal.prepare(drawn([group]), score_student=trainer_of(sampled).score)
    settings = TrainerSettings(lr=0.0, batch_size=None, max_grad_norm=None, max_tokens=max_tokens)
    return trainer_of(now).step(targets.rows, signal, settings, lr=0.0)


def test_a_steps_ratios_and_clipping_are_those_by_hand() -> None:
    clip, cap = (0.1, 0.15), 2.0
    got = metrics(clip, cap)
    old, new = per_token(TablePolicy(V, seed=2).table_VD), per_token(TablePolicy(V, seed=7).table_VD)
    gaps = [b - a for x, y in zip(old, new, strict=True) for a, b in zip(x, y, strict=True)]
    advantages = [a for a in definition("grpo", REWARDS) for _ in range(2)]
    n = len(gaps)
    assert got["policy/ratio_mean"] == pytest.approx(sum(map(math.exp, gaps)) / n)
    assert got["policy/mean_abs_log_ratio_nats"] == pytest.approx(sum(map(abs, gaps)) / n)
    assert got["policy/kl_from_draw_nats"] == pytest.approx(sum(math.exp(g) - 1 - g for g in gaps) / n)
    high = sum(a > 0 and math.exp(g) > 1.15 for a, g in zip(advantages, gaps, strict=True))
    low = sum(a < 0 and math.exp(g) < 0.9 for a, g in zip(advantages, gaps, strict=True))
    assert high >= 1, "the case must reach the clip"
    assert got["policy/frac_clipped_high"] == pytest.approx(high / n)
    assert got["policy/frac_clipped_low"] == pytest.approx(low / n)
    assert got["policy/frac_clipped"] == pytest.approx((high + low) / n)
    weights = [min(math.exp(o), cap) for off in OFF for o in off]
    assert got["policy/sampler_weight_mean"] == pytest.approx(sum(weights) / n)
    assert got["policy/frac_sampler_weight_capped"] == pytest.approx(sum(w == cap for w in weights) / n)


def test_plumbing_does_not_change_them_and_what_is_off_is_not_reported() -> None:
    one, many = metrics((0.1, 0.15), 2.0), metrics((0.1, 0.15), 2.0, max_tokens=2)
    assert {k: v for k, v in one.items() if k.startswith("policy/")} == pytest.approx(
        {k: v for k, v in many.items() if k.startswith("policy/")}
    )
    bare = metrics(None, None)
    assert not [k for k in bare if "clipped" in k or "sampler_weight" in k]


def test_tokens_that_are_not_trained_do_not_count_and_an_empty_process_adds_nothing() -> None:
    stats, n = RatioStats(), 3
    student, old = torch.tensor([0.0, 5.0, float("-inf")]), torch.zeros(n)
    used = torch.tensor([True, False, False])
    stats.add(student, old, torch.ones(n), used, clip=(0.2, 0.2), sampler_weight_C=None, cap=None)
    found = ratio_metrics(stats.take_sums(), is_clipped=True)
    assert found["policy/ratio_mean"] == 1 and found["policy/frac_clipped"] == 0
    assert found["policy/kl_from_draw_nats"] == 0
    assert stats.take_sums() == dict.fromkeys(NAMES, 0.0) and ratio_metrics(stats.take_sums(), is_clipped=True) == {}
