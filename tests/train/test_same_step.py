"""One optimiser step is the same whatever the plumbing: loss, gradient norm and updated weights."""

import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.collate import collate
from tutelage.errors import NumericsError
from tutelage.policies.policy import Policy, add_lora
from tutelage.policies.table import TablePolicy
from tutelage.policies.teachers import InProcessTeacher
from tutelage.signals import HardTargets
from tutelage.signals.base import DIVISORS
from tutelage.testing.tiny import tiny_model
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer
from tutelage.train.trainer import Place, Trainer, TrainerSettings
from tutelage.types import Draw, Group, Span, Status, TargetRow, Task, Trajectory, Verdict

torch.set_num_threads(1)
V = 5
TASK = Task(id="t", messages=({"role": "user", "content": "?"},))


def trajectory(ids: Sequence[int], prompt: int, name: str, weight: float = 1.0) -> Trajectory:
    spans = (
        Span(token_ids=tuple(ids[:prompt]), role="user", author="user"),
        Span(token_ids=tuple(ids[prompt:]), role="assistant", author="human", is_sampled=True, is_trainable=True),
    )
    verdict = Verdict(status=Status.ACCEPT if weight else Status.REJECT, score=weight)
    return Trajectory(id=name, task_id="t", task_hash=TASK.hash, spans=spans, verdict=verdict, weight=weight)


def draw(
    seed: int = 0, count: int = 7, vocab: int = V, longest: int = 9, weights: Sequence[float] = (1.0, 1.0, 0.0)
) -> Draw:
    rng = np.random.default_rng(seed)
    ts = []
    for i in range(count):
        prompt = int(rng.integers(1, 4))
        ids = rng.integers(0, vocab, prompt + int(rng.integers(1, longest))).tolist()
        ts.append(trajectory(ids, prompt, f"t{i}", weight=weights[i % 3]))
    return Draw(groups=(Group(task=TASK, trajectories=tuple(ts)),))


def one_step(
    policy: Any,
    *,
    rows: Draw,
    kind: str = "sgd",
    divisor: str = "targets",
    order: Sequence[int] | None = None,
    lr: float = 0.1,
    **settings: Any,
) -> tuple[dict[str, float], list[torch.Tensor]]:
    signal = HardTargets(divisor=divisor)  # type: ignore[arg-type]
    targets = signal.prepare(rows, score_student=lambda ts: [])
    chosen = list(targets.rows) if order is None else [targets.rows[i] for i in order]
    trainer = Trainer(policy, Optimizer(policy.named_parameters(), kind=kind), processes=Processes())
    metrics = trainer.step(chosen, signal, TrainerSettings(lr=lr, batch_size=None, **settings), lr=lr)
    return metrics, [p.detach().clone() for p in policy.parameters() if p.requires_grad]


def assert_same(a: tuple[Any, Any], b: tuple[Any, Any], rtol: float) -> None:
    for name in ("train/loss", "train/grad_norm"):
        assert a[0][name] == pytest.approx(b[0][name], rel=rtol), name
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * 1e-2)


# -- the loss is the formula --------------------------------------------------------------------


@pytest.mark.parametrize("divisor", DIVISORS)
def test_the_step_is_the_formula_by_hand(divisor: str) -> None:
    """Loss and update against a literal transcription: sums over tokens of kept trajectories, one division."""
    rows, policy = draw(weights=(1.0, 0.25, 0.0)), TablePolicy(V)
    table = policy.table_VD.detach().clone().requires_grad_()
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for t in rows:
        ids, n = t.token_ids, t.num_targets
        count += {"targets": n * (t.weight != 0), "sampled": n, "sequences": float(t.weight != 0)}[divisor]
        for i in range(len(ids) - n, len(ids)):
            total = total - t.weight * table[:, ids[i - 1]].log_softmax(0)[ids[i]]
    (total / count).backward()
    metrics, (updated,) = one_step(policy, rows=rows, divisor=divisor, max_grad_norm=None)
    assert metrics["train/loss"] == pytest.approx((total / count).item(), rel=1e-12)
    assert metrics["train/grad_norm"] == pytest.approx(float(table.grad.norm()), rel=1e-12)
    torch.testing.assert_close(updated, table.detach() - 0.1 * table.grad, rtol=1e-12, atol=1e-12)


def test_accepted_with_the_sampled_divisor_is_reinforce() -> None:
    """The gradient of -mean over samples of r * log p, r in {0, 1}, is the step's; the batch-mean divisor's is not."""
    rows, policy = draw(), TablePolicy(V)
    table = policy.table_VD.detach().clone().requires_grad_()
    sampled = sum(t.num_targets for t in rows)
    objective = torch.zeros((), dtype=torch.float64)
    for t in rows:
        reward, ids, n = float(t.verdict.is_accepted), t.token_ids, t.num_targets
        for i in range(len(ids) - n, len(ids)):
            objective = objective + reward * table[:, ids[i - 1]].log_softmax(0)[ids[i]] / sampled
    (-objective).backward()
    _, (updated,) = one_step(TablePolicy(V), rows=rows, divisor="sampled", max_grad_norm=None)
    torch.testing.assert_close(updated, policy.table_VD.detach() - 0.1 * table.grad, rtol=1e-12, atol=1e-13)
    _, (other,) = one_step(TablePolicy(V), rows=rows, divisor="targets", max_grad_norm=None)
    assert not torch.allclose(other, updated, rtol=1e-3)


# -- plumbing -----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(0, 100),
    st.integers(1, 40),
    st.sampled_from(["packed", "padded"]),
    st.sampled_from(DIVISORS),
    st.integers(1, 9),
    st.permutations(range(4)),
)
def test_table_step_does_not_depend_on_plumbing(
    seed: int, max_tokens: int, layout: str, divisor: str, chunk: int, order: list[int]
) -> None:
    rows = draw(seed, count=4)
    order = order if divisor == "sampled" else [i for i in order if i < len(rows.kept())]
    whole = one_step(TablePolicy(V), rows=rows, divisor=divisor, max_tokens=10_000, layout="padded")
    policy = TablePolicy(V, chunk_size=chunk)
    cut = one_step(policy, rows=rows, divisor=divisor, max_tokens=max_tokens, layout=layout, order=order)
    assert_same(whole, cut, 1e-10)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_transformer_step_does_not_depend_on_plumbing(kind: str, lora: bool) -> None:
    def policy(chunk: int | None = None) -> Policy:
        model = tiny_model(layers=2, width=16)
        return Policy(
            add_lora(model, r=2, alpha=4, dropout=0.0, target="all-linear", seed=3) if lora else model, chunk_size=chunk
        )

    rows = draw(1, count=6, vocab=250, longest=30)
    first = one_step(policy(), rows=rows, kind=kind, max_tokens=10_000, layout="padded", lr=1e-3)
    variants = itertools.product([10, 40, 10_000], ["packed", "padded"], [3, None])
    for max_tokens, layout, chunk in variants:
        other = one_step(policy(chunk), rows=rows, kind=kind, max_tokens=max_tokens, layout=layout, lr=1e-3)
        # Adam divides a gradient by its own size: where it is rounding noise, so is the update's sign.
        assert_same((first[0], []), (other[0], []), 1e-5)
        for a, b in zip(first[1], other[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 if kind == "sgd" else 2.5e-3)
            if kind == "adamw":
                assert float(((a - b).abs() > 1e-5).float().mean()) < 0.01


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_in_float64_the_updated_weights_are_the_same_to_ten_digits(kind: str, lora: bool) -> None:
    """Adam divides a gradient by its own size: here rounding noise is far below its epsilon, in float32 it is not."""

    def policy() -> Policy:
        model = tiny_model(layers=2, width=16, dtype=torch.float64)
        return Policy(add_lora(model, r=2, alpha=4, dropout=0.0, target="all-linear", seed=3) if lora else model)

    rows = draw(1, count=6, vocab=250, longest=30)
    start = [p.detach().clone() for p in policy().parameters() if p.requires_grad]
    first = one_step(policy(), rows=rows, kind=kind, max_tokens=10_000, layout="padded", lr=1e-3)
    for max_tokens, layout in itertools.product([10, 40, 10_000], ["packed", "padded"]):
        other = one_step(policy(), rows=rows, kind=kind, max_tokens=max_tokens, layout=layout, lr=1e-3)
        assert_same((first[0], []), (other[0], []), 1e-10)
        for before, a, b in zip(start, first[1], other[1], strict=True):
            assert a.dtype == torch.float64
            torch.testing.assert_close(b - before, a - before, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_transformers_step_does_not_depend_on_the_side_of_the_padding(dtype: torch.dtype) -> None:
    rows = HardTargets().prepare(draw(1, count=6, vocab=250, longest=30), score_student=lambda ts: []).rows

    def made(side: str) -> tuple[float, list[torch.Tensor]]:
        policy = Policy(tiny_model(layers=2, width=16, dtype=dtype))
        policy.requires_grad_(True)
        batch = collate([r for r in rows if r.is_trained], layout="padded", side=side, pad_id=99, dtype=dtype)  # type: ignore[arg-type]
        assert not batch.attention_mask_BT.all()
        loss, _ = policy(batch, HardTargets().loss, divisor=37.0)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in policy.parameters()]

    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    (left, left_gradients), (right, right_gradients) = made("left"), made("right")
    assert left == pytest.approx(right, rel=tolerance)
    for a, b in zip(left_gradients, right_gradients, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-12


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("work", ["step", "score", "teacher"])
def test_padding_counts_against_the_budget_of_a_microbatch(
    monkeypatch: pytest.MonkeyPatch, work: str, layout: str
) -> None:
    """One long trajectory among short ones: padded to it, they would take twenty times the budget."""
    lengths = [150, *[6] * 26]
    rows = Draw(
        groups=(Group(task=TASK, trajectories=tuple(trajectory([1] * n, 1, f"t{i}") for i, n in enumerate(lengths))),)
    )
    sizes: list[int] = []

    def collated(*args: Any, **kwargs: Any) -> Any:
        batch = collate(*args, **kwargs)
        sizes.append(batch.token_ids_BT.numel())
        return batch

    for name in ("tutelage.train.trainer", "tutelage.policies.teachers"):
        monkeypatch.setattr(importlib.import_module(name), "collate", collated)
    monkeypatch.setattr(TablePolicy, "supports_packing", layout == "packed")
    if work == "step":
        one_step(TablePolicy(V), rows=rows, max_tokens=200, layout=layout)
    elif work == "score":
        policy = TablePolicy(V)
        Trainer(policy, Optimizer(policy.named_parameters()), processes=Processes()).score(list(rows), max_tokens=200)
    else:
        InProcessTeacher(TablePolicy(V), max_tokens=200).score(list(rows))
    assert max(sizes) <= 200 and sum(sizes) <= sum(lengths) and len(sizes) <= 3


class OneOfTwo(Processes):
    """One of two processes, which keeps its sums to itself."""

    count, index = 2, 0

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def sum_numbers(self, numbers: Any) -> dict[str, float]:
        return dict(numbers)

    def sum_tensors(self, tensors: Any) -> None:
        """By the test."""


def test_dropout_masks_follow_from_the_update_and_its_microbatch() -> None:
    """Not from what torch drew before, nor from the process that has the microbatch; each update has its own."""
    rows = draw(1, count=6, vocab=250, longest=30)

    def gradients(processes: Processes, update: int, drawn_before: int) -> dict[str, torch.Tensor]:
        policy = Policy(
            add_lora(tiny_model(layers=1, width=16), r=2, alpha=4, dropout=0.5, target="all-linear", seed=3)
        )
        assert policy.dropout == 0.5
        torch.manual_seed(drawn_before)
        state = torch.random.get_rng_state()
        trainer = Trainer(policy, Optimizer(policy.model.named_parameters(), kind="sgd"), processes=processes)
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.01)
        signal = HardTargets()
        config = TrainerSettings(lr=0.0, batch_size=None, epochs=2, max_tokens=30, max_grad_norm=None)
        targets = signal.prepare(rows, score_student=lambda ts: [])
        place = Place(seed=0, stage=0, round=0, num_rounds=1)
        for record in trainer.steps(targets, signal, config, place):
            if record.step == update:
                break
        assert torch.equal(torch.random.get_rng_state(), state)
        return {n: g.clone() for n, g in trainer.optimizer.gradients().items()}

    one = gradients(Processes(), 0, 7)
    assert all(torch.equal(g, h) for g, h in zip(one.values(), gradients(Processes(), 0, 8).values(), strict=True))
    assert not any(torch.equal(g, h) for g, h in zip(one.values(), gradients(Processes(), 1, 7).values(), strict=True))
    halves = [gradients(OneOfTwo(i), 0, i) for i in (0, 1)]
    assert all(max(float(g.abs().max()) for g in half.values()) > 0 for half in halves)
    for name, g in one.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], g, rtol=1e-4, atol=1e-7)


def test_masters_collect_small_gradients_that_bfloat16_would_lose() -> None:
    """Many microbatches of bfloat16 gradients add up in float32: the update equals one microbatch's."""
    rows = draw(2, count=24, vocab=250, longest=30)
    results = []
    for max_tokens in (40, 10_000):
        policy = Policy(tiny_model(layers=1, width=16, dtype=torch.bfloat16))
        signal = HardTargets()
        targets = signal.prepare(rows, score_student=lambda ts: [])
        trainer = Trainer(policy, Optimizer(policy.named_parameters(), kind="sgd"), processes=Processes())
        trainer.step(targets.rows, signal, TrainerSettings(lr=0.1, batch_size=None, max_tokens=max_tokens), lr=0.1)
        results.append(torch.cat([g.flatten() for g in trainer.optimizer.gradients().values()]))
        for name, p in policy.named_parameters():
            assert torch.equal(p, trainer.optimizer.masters[name].bfloat16())
    many, one = results
    assert float(torch.nn.functional.cosine_similarity(many, one, dim=0)) > 0.9999
    assert float(many.norm() / one.norm()) == pytest.approx(1.0, abs=5e-3)


# -- guards -------------------------------------------------------------------------------------


def test_a_step_without_targets_is_an_error_and_updates_nothing() -> None:
    policy = TablePolicy(V)
    before = policy.table_VD.detach().clone()
    trainer = Trainer(policy, Optimizer(policy.named_parameters(), kind="sgd"), processes=Processes())
    with pytest.raises(NumericsError, match="divisor of a step must be positive, got 0 over 0 trajectories"):
        trainer.step([], HardTargets(), TrainerSettings(lr=1.0, batch_size=None), lr=1.0)
    assert torch.equal(before, policy.table_VD)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_is_found_before_the_update(where: str) -> None:
    policy = TablePolicy(V)
    rows = draw()
    if where == "loss":
        policy.table_VD.data[0, :] = float("nan")
    else:
        policy.table_VD.register_hook(lambda g: g * float("inf"))
    trainer = Trainer(policy, Optimizer(policy.named_parameters(), kind="sgd"), processes=Processes())
    before = policy.table_VD.detach().clone()
    signal = HardTargets()
    targets = signal.prepare(rows, score_student=lambda ts: [])
    with pytest.raises(NumericsError, match=f"the {where}.* must be finite, got (nan|inf)"):
        trainer.step(targets.rows, signal, TrainerSettings(lr=1.0, batch_size=None), lr=1.0)
    assert torch.equal(before[1:], policy.table_VD[1:]) and not torch.isinf(policy.table_VD).any()


def test_clipping_scales_the_whole_gradient_for_fused_and_plain_rules() -> None:
    rows = draw(1, count=6, vocab=250, longest=30)
    for kind in ("sgd", "adamw"):
        policy = Policy(tiny_model(layers=1, width=16))
        plain = Policy(tiny_model(layers=1, width=16))
        one_step(policy, rows=rows, kind=kind, lr=1e-2, max_grad_norm=0.05)
        reference = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](
            plain.parameters(), lr=1e-2, **({"weight_decay": 0.0} if kind == "adamw" else {})
        )
        signal = HardTargets()
        targets = signal.prepare(rows, score_student=lambda ts: [])
        trainer = Trainer(plain, Optimizer(plain.named_parameters(), kind="sgd"), processes=Processes())
        trainer.step(targets.rows, signal, TrainerSettings(lr=0.0, batch_size=None, max_grad_norm=None), lr=0.0)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        reference.step()
        for a, b in zip(policy.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_every_row_is_seen_once_an_epoch_in_an_order_fixed_by_seed() -> None:
    rows = [TargetRow(trajectory=t, columns={"weight_C": np.ones(t.num_targets)}, count=1.0) for t in draw()]
    trainer = Trainer(TablePolicy(V), Optimizer(TablePolicy(V).named_parameters()), processes=Processes())
    place = Place(seed=1, stage=0, round=0, num_rounds=1)
    config = TrainerSettings(lr=1.0, batch_size=2, epochs=3)
    plan = trainer.batches(rows, config, place)
    assert [sorted(i for b in plan[4 * e : 4 * e + 4] for i in b) for e in range(3)] == [list(range(7))] * 3
    assert plan == trainer.batches(rows, config, place)
    assert plan[:4] != plan[4:8] and plan != trainer.batches(
        rows, config, Place(seed=2, stage=0, round=0, num_rounds=1)
    )


def test_a_step_starts_from_no_gradient_whatever_came_before() -> None:
    """With a learning rate of 0 the same rows give the same gradient a second time, in every precision."""
    rows = draw(2, count=6, vocab=250, longest=30)
    for dtype in (torch.float32, torch.bfloat16):
        policy = Policy(tiny_model(layers=1, width=16, dtype=dtype))
        signal = HardTargets()
        targets = signal.prepare(rows, score_student=lambda ts: [])
        trainer = Trainer(policy, Optimizer(policy.named_parameters(), kind="sgd"), processes=Processes())
        config = TrainerSettings(lr=0.0, batch_size=None, max_tokens=40)
        first, second = (trainer.step(targets.rows, signal, config, lr=0.0)["train/grad_norm"] for _ in range(2))
        assert first == pytest.approx(second, rel=1e-6)
