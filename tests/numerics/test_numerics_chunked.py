import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_oracles import INF, quick

from tutelage import numerics
from tutelage.errors import ConfigError, DataError, NumericsError
from tutelage.numerics import chunked as engine
from tutelage.testing import shapes_match_names

chunked_loss = shapes_match_names(numerics.chunked_loss)
chunked_nats = shapes_match_names(numerics.chunked_nats)
chunked_divergence = shapes_match_names(numerics.chunked_divergence)
chunked_target_logprobs = shapes_match_names(numerics.chunked_target_logprobs)

N, D, E, V = 23, 5, 4, 17
DIVERGENCES = {
    "forward_kl": numerics.forward_kl,
    "reverse_kl": numerics.reverse_kl,
    "jsd": partial(numerics.jsd, beta=0.3, normalised=True),
    "skew_kl": numerics.skew_kl,
    "skew_reverse_kl": numerics.skew_reverse_kl,
}
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Three rows a slice, so that every chunk of these small cases is cut further, unevenly."""
    monkeypatch.setattr(engine, "_slice_rows", lambda num_rows, size, device: 3)
    monkeypatch.setattr(engine, "_WEIGHT_ROWS", 4)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Case:
    """Student, teacher and columns of one microbatch."""

    def __init__(self, n=N, dtype=torch.float64):
        self.hidden = randn(n, D, dtype=dtype).requires_grad_()
        self.weight = randn(V, D, seed=1, dtype=dtype).requires_grad_()
        self.bias = randn(V, seed=2, dtype=dtype).requires_grad_()
        self.teacher_hidden = randn(n, E, seed=3, dtype=dtype)
        self.teacher_weight = randn(V, E, seed=4, dtype=dtype)
        g = torch.Generator().manual_seed(5)
        self.ids = torch.randint(0, V, (n,), generator=g)
        self.row_weight = torch.rand(n, dtype=torch.float64, generator=g) * 2 - 0.5
        self.columns = {
            "target_ids_C": self.ids,
            "weight_C": self.row_weight,
            "teacher_hidden_CE": self.teacher_hidden,
        }

    @property
    def logits(self):
        return self.hidden @ self.weight.t()

    @property
    def teacher_logits(self):
        return self.teacher_hidden @ self.teacher_weight.t()

    def gradients(self, loss):
        inputs = (self.hidden, self.weight, self.bias)
        return torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_same(got, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-12}
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


def generic_cross_entropy(logits, columns):
    return -numerics.target_logprobs(logits, columns["target_ids_C"])


# -- equal to the plain form -----------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7, 22, 23, 24, 1000, None])
@pytest.mark.parametrize("loss_fn", [numerics.cross_entropy, generic_cross_entropy])
def test_cross_entropy_equals_plain_at_any_chunk_size(chunk_size, loss_fn):
    case = Case()
    loss, _ = chunked_loss(case.hidden, case.weight, case.columns, loss_fn, divisor=9, chunk_size=chunk_size)
    nll = torch.nn.functional.cross_entropy(case.logits, case.ids, reduction="none")
    plain = (nll * case.row_weight).sum() / 9
    assert_same([loss], [plain])
    assert_same(case.gradients(loss), case.gradients(plain))


@pytest.mark.parametrize("chunk_size", [1, 6, 23, None])
@every_divergence
def test_divergence_to_a_teacher_head_equals_plain(name, chunk_size):
    case = Case()
    loss_fn = numerics.TeacherHeadLoss(DIVERGENCES[name], case.teacher_weight)
    loss, _ = chunked_loss(case.hidden, case.weight, case.columns, loss_fn, divisor=7.5, chunk_size=chunk_size)
    plain = (DIVERGENCES[name](case.logits, case.teacher_logits) * case.row_weight).sum() / 7.5
    assert_same([loss], [plain])
    assert_same(case.gradients(loss), case.gradients(plain))


@pytest.mark.parametrize("chunk_size", [1, 4, 1000, None])
@every_divergence
def test_public_chunked_divergence_equals_plain_per_position(name, chunk_size):
    case = Case(n=2 * 11)
    student_transform, teacher_transform = (lambda x: 3 * torch.tanh(x / 3)), (lambda x: x * 0.7)
    kind, parameters = (name, {"beta": 0.3, "normalised": True}) if name == "jsd" else (name, {})
    nats = chunked_divergence(
        kind,
        case.hidden.reshape(2, 11, D),
        case.weight,
        case.teacher_hidden.reshape(2, 11, E),
        case.teacher_weight,
        student_bias_V=case.bias,
        teacher_bias_V=torch.ones(V, dtype=torch.float64).cumsum(0) / V,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        temperature=1.5,
        chunk_size=chunk_size,
        **parameters,
    )
    teacher = teacher_transform(case.teacher_logits + torch.ones(V, dtype=torch.float64).cumsum(0) / V) / 1.5
    plain = DIVERGENCES[name](student_transform(case.logits + case.bias) / 1.5, teacher).reshape(2, 11)
    assert_same([nats], [plain])
    cotangent = randn(2, 11, seed=9)
    assert_same(case.gradients((nats * cotangent).sum()), case.gradients((plain * cotangent).sum()))


def test_chunked_target_logprobs_equal_plain():
    case = Case(n=22)
    got = chunked_target_logprobs(case.hidden.reshape(2, 11, D), case.weight, case.ids.reshape(2, 11), chunk_size=5)
    plain = numerics.target_logprobs(case.logits, case.ids).reshape(2, 11)
    assert_same([got], [plain])
    assert_same(case.gradients(got.square().sum()), case.gradients(plain.square().sum()))


@pytest.mark.parametrize("loss_fn", [numerics.cross_entropy, generic_cross_entropy])
def test_bias_and_logit_transform_equal_plain(loss_fn):
    case = Case()

    def softcap(logits):
        return 2 * torch.tanh(logits / 2)

    loss, _ = chunked_loss(
        case.hidden,
        case.weight,
        case.columns,
        loss_fn,
        divisor=3,
        chunk_size=5,
        bias_V=case.bias,
        logit_transform=softcap,
    )
    nll = generic_cross_entropy(softcap(case.logits + case.bias), case.columns)
    plain = numerics.weighted_sum(nll, case.row_weight, divisor=3)
    assert_same([loss], [plain])
    assert_same(case.gradients(loss), case.gradients(plain))


def test_gradients_against_finite_differences():
    case = Case(n=5)
    columns = {name: column[:5] for name, column in case.columns.items()}
    for loss_fn in (numerics.cross_entropy, numerics.TeacherHeadLoss(numerics.reverse_kl, case.teacher_weight)):

        def reduced(h, w, b, loss_fn=loss_fn):
            return chunked_loss(h, w, columns, loss_fn, divisor=2, chunk_size=2, bias_V=b)[0]

        def per_target(h, w, b, loss_fn=loss_fn):
            return chunked_nats(h, w, columns, loss_fn, chunk_size=2, bias_V=b)

        assert torch.autograd.gradcheck(reduced, (case.hidden, case.weight, case.bias))
        assert torch.autograd.gradcheck(per_target, (case.hidden, case.weight, case.bias))


def test_backward_scales_with_what_comes_from_above():
    case = Case()
    loss, _ = chunked_loss(case.hidden, case.weight, case.columns, numerics.cross_entropy, divisor=1)
    once = case.gradients(loss)
    again, _ = chunked_loss(case.hidden, case.weight, case.columns, numerics.cross_entropy, divisor=1)
    thrice = case.gradients(again * -3)
    assert_same(thrice[:2], [g * -3 for g in once[:2]])


@pytest.mark.parametrize("loss", ["cross_entropy", *DIVERGENCES])
def test_bfloat16_is_at_most_a_little_worse_than_the_plain_bfloat16_form(loss):
    """Relative to float64 of the same rounded inputs: logits are rounded in both, sums of chunks only here."""
    n, d, v, e = 300, 32, 400, 24
    hidden, weight = randn(n, d).bfloat16(), (randn(v, d, seed=1) / 4).bfloat16()
    t_hidden, t_weight = randn(n, e, seed=2).bfloat16(), (randn(v, e, seed=3) / 4).bfloat16()
    ids = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(0))
    columns = {"target_ids_C": ids, "teacher_hidden_CE": t_hidden}

    def run(form, dtype):
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        th, tw = t_hidden.to(dtype), t_weight.to(dtype)
        if form == "chunked":
            fn = numerics.cross_entropy if loss == "cross_entropy" else numerics.TeacherHeadLoss(DIVERGENCES[loss], tw)
            out = chunked_loss(h, w, columns, fn, divisor=n, chunk_size=64)[0]
        else:
            logits = h @ w.t()
            nats = (
                generic_cross_entropy(logits, columns)
                if loss == "cross_entropy"
                else DIVERGENCES[loss](logits, th @ tw.t())
            )
            out = nats.sum() / n
        out.backward()
        assert h.grad.dtype == w.grad.dtype == dtype
        return out.detach().double(), h.grad.double(), w.grad.double()

    exact, plain, got = run("plain", torch.float64), run("plain", torch.bfloat16), run("chunked", torch.bfloat16)
    for e_, p, c in zip(exact, plain, got, strict=True):
        assert (c - e_).norm() <= 1.25 * (p - e_).norm() + 1e-4 * e_.norm()
        assert (c - e_).norm() <= 1e-2 * e_.norm()


def test_autocast_runs_the_matrix_products_in_its_dtype_and_returns_the_inputs_dtype():
    case = Case(dtype=torch.float32)
    args = (case.columns, numerics.cross_entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_loss(case.hidden, case.weight, *args, divisor=N)
    got = case.gradients(loss)
    rounded, _ = chunked_loss(case.hidden.bfloat16(), case.weight.bfloat16(), *args, divisor=N)
    assert loss.dtype == got[0].dtype == got[1].dtype == torch.float32
    assert_same([loss], [rounded], rtol=1e-6, atol=1e-7)
    assert_same(got[:2], case.gradients(rounded)[:2], rtol=2e-2, atol=1e-3)


# -- invariances -----------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, N), max_size=4), st.integers(1, 30))
def test_step_does_not_depend_on_microbatches_or_chunks(cuts, chunk_size):
    case = Case()
    whole, _ = chunked_loss(case.hidden, case.weight, case.columns, numerics.cross_entropy, divisor=N)
    expected = case.gradients(whole)
    edges = [0, *sorted(cuts), N]
    total, gradients = 0.0, [torch.zeros_like(case.hidden), torch.zeros_like(case.weight)]
    for start, stop in itertools.pairwise(edges):
        part = {name: column[start:stop] for name, column in case.columns.items()}
        loss, _ = chunked_loss(
            case.hidden[start:stop], case.weight, part, numerics.cross_entropy, divisor=N, chunk_size=chunk_size
        )
        total += loss.item()
        for sum_, g in zip(gradients, case.gradients(loss), strict=False):
            sum_ += g
    assert total == pytest.approx(whole.item(), rel=1e-12)
    assert_same(gradients, expected[:2])


@pytest.mark.parametrize("loss_fn", [numerics.cross_entropy, generic_cross_entropy])
def test_targets_of_weight_zero_never_matter(loss_fn):
    case = Case()
    case.row_weight[[0, 4, 5, 6, 22]] = 0.0
    clean, _ = chunked_loss(case.hidden, case.weight, case.columns, loss_fn, divisor=N, chunk_size=4)
    expected = case.gradients(clean)
    bad = case.hidden.detach().clone()
    bad[4], bad[22] = math.nan, INF
    ids = case.ids.clone()
    ids[5] = 10**6  # outside the vocabulary
    columns = {**case.columns, "target_ids_C": ids}
    hidden = bad.requires_grad_()
    loss, _ = chunked_loss(hidden, case.weight, columns, loss_fn, divisor=N, chunk_size=4)
    got = torch.autograd.grad(loss, (hidden, case.weight))
    assert_same([loss, *got], [clean, *expected[:2]])
    assert got[0][[0, 4, 5, 6, 22]].abs().max() == 0


def test_no_targets_and_no_weighted_targets_give_zero_with_a_graph():
    case = Case()
    for rows, weight in ((0, case.row_weight[:0]), (N, torch.zeros(N))):
        hidden = case.hidden[:rows]
        columns = {"target_ids_C": case.ids[:rows], "weight_C": weight}
        loss, stats = chunked_loss(
            hidden, case.weight, columns, numerics.cross_entropy, divisor=3, stats_fn=numerics.entropy_stats
        )
        got = torch.autograd.grad(loss, (hidden, case.weight))
        assert loss.item() == 0.0 and stats == {}
        assert got[0].shape == (rows, D) and not got[0].any() and not got[1].any()
    nats = chunked_nats(case.hidden[:0], case.weight, {"target_ids_C": case.ids[:0]}, numerics.cross_entropy)
    assert nats.shape == (0,) and nats.requires_grad


@every_divergence
def test_a_fully_masked_row_and_infinite_teacher_logits_equal_plain(name):
    """A teacher bias of -inf rules tokens out; the student's bias rules out the same, and one row is masked whole."""
    case = Case(n=12)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[[3, 9, 16]] = -INF
    weight = torch.ones(3, 4, dtype=torch.float64)
    weight[1] = 0
    columns = {"teacher_hidden_CE": case.teacher_hidden, "weight_C": weight.flatten()}
    loss_fn = numerics.TeacherHeadLoss(DIVERGENCES[name], case.teacher_weight, teacher_bias_V=bias)
    loss, _ = chunked_loss(case.hidden, case.weight, columns, loss_fn, divisor=8, chunk_size=5, bias_V=bias)
    nats = DIVERGENCES[name](case.logits + bias, case.teacher_logits + bias).reshape(3, 4)
    plain = numerics.mean_over_tokens(nats, weight > 0, num_targets=8)
    assert_same([loss], [plain])
    got = case.gradients(loss)[:2]
    assert_same(got, case.gradients(plain)[:2])
    assert all(torch.isfinite(g).all() for g in got)


def test_a_target_nobody_asked_about_does_not_leak_through_the_per_target_form():
    case = Case(n=6)
    hidden = case.hidden.detach().clone()
    hidden[2] = INF
    hidden.requires_grad_()
    nats = chunked_nats(hidden, case.weight, {"target_ids_C": case.ids}, numerics.cross_entropy, chunk_size=4)
    torch.where(torch.arange(6) == 2, 0.0, nats).sum().backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad[0].abs().sum() > 0


# -- who gets a gradient ---------------------------------------------------------------------


def test_frozen_weight_gets_no_gradient_and_changes_nothing_else():
    case = Case()
    loss, _ = chunked_loss(case.hidden, case.weight, case.columns, numerics.cross_entropy, divisor=N)
    frozen, _ = chunked_loss(case.hidden, case.weight.detach(), case.columns, numerics.cross_entropy, divisor=N)
    assert_same(torch.autograd.grad(frozen, case.hidden), case.gradients(loss)[:1])
    only_head, _ = chunked_loss(case.hidden.detach(), case.weight, case.columns, numerics.cross_entropy, divisor=N)
    assert_same(torch.autograd.grad(only_head, case.weight), case.gradients(loss)[1:2])


def test_tied_embedding_adds_both_gradients():
    case = Case()
    tokens = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    loss, _ = chunked_loss(case.weight[tokens], case.weight, case.columns, numerics.cross_entropy, divisor=N)
    nll = generic_cross_entropy(case.weight[tokens] @ case.weight.t(), case.columns)
    plain = numerics.weighted_sum(nll, case.row_weight, divisor=N)
    assert_same(torch.autograd.grad(loss, case.weight), torch.autograd.grad(plain, case.weight))


def test_no_grad_computes_the_value_and_no_gradient():
    case = Case()
    calls = []

    class Watching(numerics.CrossEntropy):
        def value_and_grad(self, logits, columns):
            calls.append("gradient")
            return super().value_and_grad(logits, columns)

    with torch.no_grad():
        loss, _ = chunked_loss(case.hidden, case.weight, case.columns, Watching(), divisor=N)
        nats = chunked_nats(case.hidden, case.weight, case.columns, Watching())
    assert not loss.requires_grad and not nats.requires_grad and calls == []
    with_grad, _ = chunked_loss(case.hidden, case.weight, case.columns, Watching(), divisor=N)
    assert_same([loss], [with_grad.detach()])
    assert calls


def test_teacher_gets_no_gradient_from_the_chunked_forms():
    case = Case()
    case.teacher_hidden.requires_grad_()
    case.teacher_weight.requires_grad_()
    loss_fn = numerics.TeacherHeadLoss(numerics.forward_kl, case.teacher_weight)
    loss, _ = chunked_loss(case.hidden, case.weight, case.columns, loss_fn, divisor=N)
    nats = chunked_divergence("jsd", case.hidden[None], case.weight, case.teacher_hidden[None], case.teacher_weight)
    (loss + nats.sum()).backward()
    assert case.hidden.grad is not None and case.teacher_hidden.grad is None and case.teacher_weight.grad is None


def test_nothing_the_size_of_all_logits_is_computed_and_nothing_twice():
    """Counts the rows of logits the loss sees: each target once, never more than a slice at a time."""
    case, seen = Case(), []

    def counting(logits, columns):
        seen.append(len(logits))
        return generic_cross_entropy(logits, columns)

    loss, _ = chunked_loss(case.hidden, case.weight, case.columns, counting, divisor=N, chunk_size=7)
    loss.backward()
    assert sum(seen) == N and max(seen) == 3


# -- stats -----------------------------------------------------------------------------------


def test_stats_are_sums_over_the_weighted_targets_on_the_transformed_logits():
    case = Case()
    case.row_weight[[1, 2]] = 0.0
    _, stats = chunked_loss(
        case.hidden,
        case.weight,
        case.columns,
        numerics.cross_entropy,
        divisor=N,
        chunk_size=5,
        logit_transform=lambda x: x * 2,
        stats_fn=numerics.entropy_stats,
    )
    used = case.row_weight != 0
    expected = numerics.entropy(case.logits.detach() * 2)[used].sum()
    assert_same([stats["entropy_nats"]], [expected])
    assert stats["num_targets"].item() == N - 2 and not stats["entropy_nats"].requires_grad
    with torch.no_grad():
        _, again = chunked_loss(
            case.hidden,
            case.weight,
            case.columns,
            numerics.cross_entropy,
            divisor=N,
            logit_transform=lambda x: x * 2,
            stats_fn=numerics.entropy_stats,
        )
    assert_same([again["entropy_nats"]], [expected])


# -- errors ----------------------------------------------------------------------------------


def test_errors_name_what_was_given():
    case = Case()
    run = partial(numerics.chunked_loss, loss_fn=numerics.cross_entropy)
    ids = {"target_ids_C": case.ids}
    with pytest.raises(NumericsError, match="divisor must be positive, got 0"):
        run(case.hidden, case.weight, ids, divisor=0)
    with pytest.raises(DataError, match=r"hidden \(23, 5\), weight \(17, 4\)"):
        run(case.hidden, case.teacher_weight, ids, divisor=1)
    with pytest.raises(DataError, match=r"'target_ids_C' needs one row per target \(23\), got shape \(22,\)"):
        run(case.hidden, case.weight, {"target_ids_C": case.ids[:22]}, divisor=1)
    with pytest.raises(DataError, match=r"bfloat16.*float64"):
        run(case.hidden.bfloat16(), case.weight, ids, divisor=1)
    with pytest.raises(DataError, match=r"bias needs one entry per row of the weight \(17\), got \(16,\)"):
        run(case.hidden, case.weight, ids, divisor=1, bias_V=case.bias[:16])
    with pytest.raises(ConfigError, match="chunk_size must be at least 1 target, got 0"):
        run(case.hidden, case.weight, ids, divisor=1, chunk_size=0)
    with pytest.raises(DataError, match=r"one value per target \(3,\), got \(\)"):
        numerics.chunked_loss(case.hidden, case.weight, ids, lambda x, c: x.sum(), divisor=1)
    with pytest.raises(DataError, match=r"17 student rows and 16 teacher rows.*weight\[:shared_vocabulary\]"):
        numerics.chunked_divergence("jsd", case.hidden, case.weight, case.teacher_hidden, case.teacher_weight[:16])
    with pytest.raises(ConfigError, match="got 'kl'"):
        numerics.chunked_divergence("kl", case.hidden, case.weight, case.teacher_hidden, case.teacher_weight)
