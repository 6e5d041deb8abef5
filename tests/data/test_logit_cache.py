"""The logit cache: what is read back, what it costs, what it refuses, and the same step as the live teacher."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.data import logit_cache
from tutelage.data.logit_cache import LogitCache, TopK, largest_k, spread_tail, trajectory_key, write_logit_cache
from tutelage.data.logit_codec import Codec
from tutelage.errors import ConfigError, DataError, NumericsError
from tutelage.policies.table import TablePolicy
from tutelage.policies.teachers import InProcessTeacher, top_k_of
from tutelage.types import Span, Trajectory

QWEN = 151_936


def peaked(vocab, exponent, n, seed=0):
    """Zipf distributions over shuffled ids, log-normally roughened: (n, V) log-probabilities in float64."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocab + 1, dtype=torch.float64)
    rows = []
    for _ in range(n):
        logits = -exponent * rank.log() + 0.2 * torch.randn(vocab, generator=g, dtype=torch.float64)
        rows.append(logits.log_softmax(-1)[torch.randperm(vocab, generator=g)])
    return torch.stack(rows)


def kl_to_stored(full, top):
    ids, lp, tail = (torch.from_numpy(np.asarray(c).copy()) for c in top)
    stored = spread_tail(ids.long(), lp.double(), tail.double(), full.shape[1]).log_softmax(-1)
    return (full.exp() * (full - stored)).sum(-1)


# -- the record -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [3.6, 4.0, 6.0])
def test_peaked_distributions_fit_in_220_bytes_within_1e_4_nats(exponent):
    full = peaked(QWEN, exponent, 4)
    full = full[-(full.exp() * full).sum(-1) < 0.5]
    assert len(full) >= 2
    codec = Codec(largest_k(QWEN), QWEN)
    assert codec.record_bytes <= 220
    back = codec.decode(codec.encode(top_k_of(full, codec.k)))
    kl = kl_to_stored(full, back)
    assert (kl < 1e-4).all() and (kl >= -1e-12).all()


def test_shortening_the_numbers_costs_little_where_entropy_is_high_too():
    full = peaked(QWEN, 1.0, 4)
    codec = Codec(largest_k(QWEN), QWEN)
    top = top_k_of(full, codec.k)
    extra = kl_to_stored(full, codec.decode(codec.encode(top))) - kl_to_stored(full, top)
    assert extra.abs().max() < 1e-5


@given(
    st.sampled_from([(5, 5), (5, 3), (300, 9), (1 << 16, 12), ((1 << 16) + 1, 12), (1 << 18, 8), (1 << 20, 40)]),
    st.floats(0.0, 30.0),
    st.integers(0, 2**31),
)
def test_ids_come_back_exactly_and_numbers_nearly(shape, spread, seed):
    vocab, k = shape
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(vocab, size=k, replace=False) for _ in range(3)])
    ids[0, 0] = vocab - 1 if vocab - 1 not in ids[0, 1:] else ids[0, 0]
    lp = -np.sort(rng.exponential(spread, size=(3, k)).cumsum(1) / 3 + 1e-3, axis=1)
    lp = lp - np.log(np.exp(lp).sum(1, keepdims=True) * 1.01)
    top = TopK(ids, lp, np.full(3, math.log(0.01 / 1.01)))
    codec = Codec(k, vocab)
    back = codec.decode(codec.encode(top))
    assert np.array_equal(back.ids, ids)
    np.testing.assert_allclose(back.tail, top.tail, rtol=1e-3)
    np.testing.assert_allclose(back.logprobs[:, :8], lp[:, :8], rtol=1e-3, atol=1e-6)
    assert (np.exp(lp) * np.minimum(np.abs(back.logprobs - lp), 10) ** 2).sum(1).max() < 1e-3
    assert (np.diff(back.logprobs, axis=1) <= 1e-2).all()


def test_full_precision_is_exact():
    full = peaked(50, 1.0, 5)
    for precision, dtype in (("float64", np.float64), ("float32", np.float32)):
        codec = Codec(50, 50, precision)
        top = top_k_of(full, 50)
        back = codec.decode(codec.encode(top))
        assert np.array_equal(back.ids, top.ids) and np.array_equal(back.logprobs, top.logprobs.astype(dtype))
        assert (back.tail == -np.inf).all()


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: t._replace(ids=t.ids + 48), "below the vocabulary's 50"),
        (lambda t: t._replace(logprobs=t.logprobs[:, ::-1]), "most likely first"),
        (lambda t: t._replace(logprobs=t.logprobs + 9), "at most 0"),
        (lambda t: t._replace(tail=t.tail * np.nan), "at most 0"),
        (lambda t: TopK(t.ids[:, :3], t.logprobs[:, :3], t.tail), "keeps 4 entries"),
    ],
)
def test_answers_that_make_no_sense_are_refused(change, words):
    top = top_k_of(peaked(50, 1.0, 2), 4)
    with pytest.raises(DataError, match=words):
        Codec(4, 50).encode(change(top))


def test_spreading_keeps_the_mass_and_skips_absent_entries():
    ids = torch.tensor([[3, 1, 0], [2, 0, 0]])
    lp = torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.0, 0.0]], dtype=torch.float64).log()
    full = spread_tail(ids, lp, torch.tensor([0.2, 0.4], dtype=torch.float64).log(), 5).exp()
    torch.testing.assert_close(full[0], torch.tensor([0.1, 0.2, 0.1, 0.5, 0.1], dtype=torch.float64))
    torch.testing.assert_close(full[1], torch.tensor([0.1, 0.1, 0.6, 0.1, 0.1], dtype=torch.float64))


# -- the folder -----------------------------------------------------------------------------------------------------

V = 7


def trajectory(ids, *, tokenizer="T1", at="t"):
    spans = (
        Span(token_ids=(0,), role="user", author="user"),
        Span(token_ids=tuple(ids), role="assistant", author="human", is_sampled=True, is_trainable=True),
    )
    return Trajectory(id=at, task_id="q", task_hash="q", spans=spans, tokenizer=tokenizer)


def some(n=6):
    rng = np.random.default_rng(1)
    return [trajectory(rng.integers(0, V, size=3 + i % 4).tolist(), at=f"t{i}") for i in range(n)]


class Counting(InProcessTeacher):
    """Counts what it is asked, and can stop after a few chunks."""

    def __init__(self, *args, stop_after=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked, self.stop_after = [], stop_after

    def top_k(self, trajectories, k, *, temperature=1.0):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append([t.id for t in trajectories])
        return super().top_k(trajectories, k, temperature=temperature)


def write(folder, ts, *, teacher=None, **kwargs):
    teacher = teacher or Counting(TablePolicy(V, order=1, seed=3), name="big")
    return write_logit_cache(folder, ts, teacher, **{"vocab_size": V, "tokenizer": "T1", **kwargs})


def test_what_is_read_is_what_the_teacher_said(tmp_path):
    ts = some()
    teacher = Counting(TablePolicy(V, order=1, seed=3), name="big")
    cache = write(tmp_path, ts, teacher=teacher, k=4, precision="float64", chunk_tokens=8)
    assert len(cache) == 6 and cache.num_tokens == sum(t.num_targets for t in ts) and len(teacher.asked) > 2
    order = [4, 0, 5, 2]
    want = InProcessTeacher.top_k(teacher, [ts[i] for i in order], 4)
    for a, b in zip(cache.top_k([ts[i] for i in order]), want, strict=True):
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.logprobs, b.logprobs)
        assert np.array_equal(a.tail, b.tail)
    assert (cache.name, cache.k, cache.temperature) == ("big", 4, 1.0)
    assert cache.top_k([]) == []


def test_equal_trajectories_are_kept_once(tmp_path):
    ts = some()
    twice = [replace(t, id=f"again-{t.id}") for t in ts[:3]]
    cache = write(tmp_path, [*ts[:4], *twice, *ts[4:]], k=4)
    assert len(cache) == 6 and cache.num_tokens == sum(t.num_targets for t in ts)
    for a, b in zip(cache.top_k(twice), cache.top_k(ts[:3]), strict=True):
        assert np.array_equal(a.ids, b.ids)


def test_a_stopped_writer_goes_on_where_it_was(tmp_path):
    ts = some()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, ts, teacher=Counting(TablePolicy(V, seed=3), name="big", stop_after=2), k=4, chunk_tokens=8)
    with pytest.raises(DataError, match="not finished"):
        LogitCache(tmp_path)
    teacher = Counting(TablePolicy(V, seed=3), name="big")
    cache = write(tmp_path, ts, teacher=teacher, k=4, chunk_tokens=8)
    whole = write(tmp_path.parent / "other", ts, k=4, chunk_tokens=8)
    assert {i for ids in teacher.asked for i in ids}.isdisjoint({"t0", "t1"})
    for a, b in zip(cache.top_k(ts), whole.top_k(ts), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_measured_kl_is_stored_with_the_cache(tmp_path):
    ts = some()
    table = TablePolicy(V, seed=3)
    with torch.no_grad():
        table.table_VD *= 6  # peaked
    cache = write(tmp_path, ts, teacher=InProcessTeacher(table, name="big"), k=2, check_tokens=1000)
    teacher = InProcessTeacher(table)
    full = torch.cat([teacher.full_logprobs(t, 99) for t in ts])
    kl = torch.cat([kl_to_stored(teacher.full_logprobs(t, 99), a) for t, a in zip(ts, cache.top_k(ts), strict=True)])
    low = -(full.exp() * full).sum(-1) < 0.5
    assert 0 < int(low.sum()) < len(low)
    got = LogitCache(tmp_path).fidelity
    assert got["all"]["num_tokens"] == len(kl) and got["all"]["mean_kl_nats"] == pytest.approx(kl.mean().item())
    assert got["low_entropy"]["mean_kl_nats"] == pytest.approx(kl[low].mean().item())
    assert got["low_entropy"]["max_kl_nats"] == pytest.approx(kl[low].max().item())
    with pytest.raises(DataError, match="larger k"):
        write(tmp_path.parent / "strict", ts, teacher=InProcessTeacher(table, name="big"), k=1, max_kl=1e-9)


def test_a_codec_that_loses_ids_or_numbers_is_noticed_while_writing(tmp_path, monkeypatch):
    sound = Codec.decode

    def wrong_ids(self, records):
        top = sound(self, records)
        return top._replace(ids=np.roll(top.ids, 1, axis=1))

    def wrong_numbers(self, records):
        top = sound(self, records)
        return top._replace(logprobs=top.logprobs * 1.3)

    for i, (fake, words) in enumerate(((wrong_ids, "ids read back"), (wrong_numbers, "nats from the teacher"))):
        monkeypatch.setattr(logit_cache.Codec, "decode", fake)
        with pytest.raises(NumericsError, match=words):
            write(tmp_path / str(i), some(), k=5)
        monkeypatch.undo()


def test_what_does_not_match_is_refused(tmp_path):
    ts = some()
    cache = write(tmp_path, ts, k=4)
    with pytest.raises(DataError, match=r"tokenizer 'T1'.*'T2'"):
        LogitCache(tmp_path, tokenizer="T2")
    with pytest.raises(DataError, match=r"7 entries.*has 5.*--student"):
        LogitCache(tmp_path, vocab_size=5)
    assert LogitCache(tmp_path, vocab_size=9, num_ids=7).vocab_size == 7
    with pytest.raises(DataError, match="ids up to 8"):
        LogitCache(tmp_path, vocab_size=9, num_ids=9)
    with pytest.raises(DataError, match="other tokens"):
        cache.top_k([replace(ts[0], tokenizer="T2")])
    with pytest.raises(DataError, match=r"'t9'.*not in the logit cache.*6 trajectories"):
        cache.top_k([trajectory([1, 2, 3, 4, 5, 6], at="t9")])
    off = replace(ts[0].spans[1], token_ids=ts[0].spans[1].token_ids[:1], is_trainable=False)
    on = replace(ts[0].spans[1], token_ids=ts[0].spans[1].token_ids[1:])
    with pytest.raises(DataError, match="its targets"):
        cache.top_k([replace(ts[0], spans=(ts[0].spans[0], off, on))])
    with pytest.raises(ConfigError, match="k 4 there, 5 wanted"):
        write(tmp_path, ts, k=5)
    with pytest.raises(ConfigError, match="trajectories"):
        write(tmp_path, ts[:-1], k=4)
    with pytest.raises(ConfigError, match="weights '' there, 'retrained' wanted"):
        write(tmp_path, ts, k=4, weights="retrained")
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="above 0"):
            write(tmp_path / "new", ts, k=4, temperature=temperature)
    with pytest.raises(ConfigError, match="k must be between 1"):
        write(tmp_path / "new", ts, k=0)
    with pytest.raises(DataError, match="tokenizer T2"):
        write(tmp_path / "new", [replace(ts[0], tokenizer="T2")], k=4)


def test_a_damaged_or_missing_cache_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        LogitCache(tmp_path / "none")
    write(tmp_path, some(), k=4)
    path = tmp_path / "chunk-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"must have \d+ bytes, has \d+"):
        LogitCache(tmp_path)
    facts = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        LogitCache(tmp_path)


def test_a_cache_at_a_temperature_holds_the_softened_distribution(tmp_path):
    ts = some(2)
    table = TablePolicy(V, seed=3)
    cache = write(tmp_path, ts, teacher=InProcessTeacher(table, name="b"), k=V, precision="float64", temperature=2.0)
    full = spread_tail(*(torch.from_numpy(np.asarray(c).copy()) for c in _long(cache.top_k(ts)[0])), V)
    tokens = torch.tensor([ts[0].token_ids])
    want = (table.logits(tokens)[0, :-1] / 2).log_softmax(-1)
    torch.testing.assert_close(full, want.detach(), rtol=1e-12, atol=1e-12)
    assert cache.temperature == 2.0


def _long(top):
    return TopK(top.ids.astype(np.int64), top.logprobs, top.tail)


def test_a_key_is_the_ids_and_the_targets():
    a, b = trajectory([1, 2]), trajectory([1, 2], at="other")
    assert trajectory_key(a) == trajectory_key(b) != trajectory_key(trajectory([2, 1]))
    assert trajectory_key(a) != trajectory_key(replace(a, spans=(a.spans[0], replace(a.spans[1], is_trainable=False))))
