"""One token of a logit cache as bytes: the teacher's exact top-k ids, their log-probabilities, and the tail's mass.

Dimension letters:  N  tokens   K  top-k entries, most likely first   R  bytes of a record

A packed record, for a vocabulary of V entries (ids of b = 16 bits and 0, 2, 4 or 8 more):

  ids        K x uint16, then the higher bits together
  head       the first 8 log-probabilities, float16
  steps      the rest as falls from one to the next, 4 bits each, from a table scaled by the token's own step size
  tail, step float16 log of the mass outside the top-k; 1 byte index of the step size

With 18-bit ids 74 entries take 220 bytes. Ids take most of it, which is why the values are short. A step is chosen
against the sum of the steps before it, so errors do not add up.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import ConfigError, DataError

HEAD = 8
"""Entries whose log-probability has 16 bits of its own."""
_BLOCK = 512
_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 11, 15, 21, 30, 44, 66, 100, 160, 260], dtype=np.float32)
_STEPS = np.float32(0.0005) * np.float32(2.0) ** np.arange(12, dtype=np.float32)
"""Step sizes in nats that a token chooses from: the smallest reach falls of 0.13 nats, the largest of 266."""


class TopK(NamedTuple):
    """A teacher's answer for N targets: its K most likely tokens and the rest as one."""

    ids: Any
    """(N, K) integer ids, distinct in a row."""
    logprobs: Any
    """(N, K) nats; -inf marks an entry that is absent."""
    tail: Any
    """(N,) nats, log of the mass of everything else; -inf where there is none."""

    @classmethod
    def empty(cls) -> "TopK":
        return cls(np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1)), np.zeros(0))


def spread_tail(ids_CK: Tensor, logprobs_CK: Tensor, tail_C: Tensor, vocab_size: int) -> Tensor:
    """(C, V) log-probabilities: the top-k as given, the tail's mass spread evenly over the rest."""
    is_present_CK = logprobs_CK > -torch.inf
    num_rest_C = (vocab_size - is_present_CK.sum(-1)).clamp_min(1)
    each_C = tail_C - num_rest_C.to(tail_C.dtype).log()
    full_CV = each_C.unsqueeze(-1).expand(-1, vocab_size + 1).clone()
    # Absent entries go to one column past the end: their ids may repeat a real one.
    places_CK = torch.where(is_present_CK, ids_CK, vocab_size)
    return full_CV.scatter_(-1, places_CK, logprobs_CK)[:, :vocab_size]


@dataclass(frozen=True)
class Codec:
    """How a record is laid out.

    Args:
        precision: "packed" as above; "float32" or "float64" for every number in full, with 4-byte ids.
    """

    k: int
    vocab_size: int
    precision: str = "packed"

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.k <= self.vocab_size:
            problems.append(f"k must be between 1 and the vocabulary's {self.vocab_size} entries, got {self.k}")
        if self.precision not in ("packed", "float32", "float64"):
            problems.append(f"precision must be packed, float32 or float64; got {self.precision!r}")
        if self.vocab_size > 1 << 24:
            problems.append(f"ids have at most 24 bits, got a vocabulary of {self.vocab_size}")
        if problems:
            raise ConfigError(problems)

    @property
    def high_bits(self) -> int:
        """Bits of an id beyond 16: 0, 2, 4 or 8."""
        return next(b for b in (0, 2, 4, 8) if self.vocab_size <= 1 << (16 + b))

    @cached_property
    def _fields(self) -> dict[str, slice]:
        head = min(HEAD, self.k)
        sizes = {
            "low": 2 * self.k,
            "high": -(-self.k * self.high_bits // 8),
            "head": 2 * head,
            "steps": -(-(self.k - head) // 2),
            "tail": 2,
            "step": 1,
        }
        out, start = {}, 0
        for name, size in sizes.items():
            out[name] = slice(start, start + size)
            start += size
        return out

    @property
    def record_bytes(self) -> int:
        """Bytes of one token."""
        if self.precision != "packed":
            width = 4 if self.precision == "float32" else 8
            return self.k * (4 + width) + width
        return int(self._fields["step"].stop)

    # -- encoding ------------------------------------------------------------------------------

    def encode(self, top: TopK) -> Any:
        """(N, R) uint8 records of exact answers, most likely entry first.

        Raises:
            DataError: the answer has another number of entries, an id outside the vocabulary, entries out of order, or
                a number that is not a log-probability.
        """
        ids, logprobs, tail = np.asarray(top.ids), np.asarray(top.logprobs), np.asarray(top.tail)
        self._check(ids, logprobs, tail)
        if self.precision != "packed":
            kind = "<f4" if self.precision == "float32" else "<f8"
            parts = [ids.astype("<i4"), logprobs.astype(kind), tail[:, None].astype(kind)]
            return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1)
        out = np.zeros((len(ids), self.record_bytes), dtype=np.uint8)
        f = self._fields
        out[:, f["low"]] = np.ascontiguousarray((ids & 0xFFFF).astype("<u2")).view(np.uint8)
        if self.high_bits:
            out[:, f["high"]] = _pack((ids >> 16).astype(np.uint8), self.high_bits)
        head = np.minimum(-logprobs[:, :HEAD], 6e4).astype("<f2")
        out[:, f["head"]] = np.ascontiguousarray(head).view(np.uint8)
        out[:, f["tail"]] = np.ascontiguousarray((-tail[:, None]).astype("<f2")).view(np.uint8)
        if self.k > HEAD:
            codes, step = _best_steps(-logprobs[:, HEAD:].astype(np.float32), head[:, -1].astype(np.float32))
            out[:, f["steps"]] = _pack(codes, 4)
            out[:, f["step"]] = step[:, None]
        return out

    def _check(self, ids: Any, logprobs: Any, tail: Any) -> None:
        n = len(ids)
        if ids.shape != (n, self.k) or logprobs.shape != (n, self.k) or tail.shape != (n,):
            raise DataError(
                f"the cache keeps {self.k} entries a token; got ids {ids.shape}, log-probabilities {logprobs.shape}, "
                f"tail {tail.shape}"
            )
        if n and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise DataError(f"ids must be below the vocabulary's {self.vocab_size}, got {ids.min()} to {ids.max()}")
        if n and not (logprobs[:, 0] > -np.inf).all():
            raise DataError("the most likely entry of every token needs a finite log-probability")
        if not (logprobs <= 1e-3).all() or not (tail <= 1e-3).all():
            raise DataError("log-probabilities must be at most 0 (and not nan)")
        if self.k > 1 and not (np.diff(np.maximum(logprobs, -6e4), axis=1) <= 0).all():
            raise DataError("entries must come most likely first")

    # -- decoding ------------------------------------------------------------------------------

    def decode(self, records: Any) -> TopK:
        """What `encode` was given: ids exactly, numbers as their bits allow, as (N, K) int32 and float32 or float64."""
        records = np.ascontiguousarray(records)
        if records.ndim != 2 or records.shape[1] != self.record_bytes:
            raise DataError(f"records need {self.record_bytes} bytes each, got an array of shape {records.shape}")
        if len(records) > _BLOCK:  # what is being worked on stays in the processor's cache
            parts = [self.decode(records[i : i + _BLOCK]) for i in range(0, len(records), _BLOCK)]
            return TopK(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        if self.precision != "packed":
            kind, width = ("<f4", 4) if self.precision == "float32" else ("<f8", 8)
            a, b = 4 * self.k, (4 + width) * self.k
            columns = (records[:, :a], "<i4"), (records[:, a:b], kind), (records[:, b:], kind)
            ids, logprobs, tail = (np.ascontiguousarray(c).view(t) for c, t in columns)
            return TopK(ids, logprobs, tail[:, 0])
        f = self._fields
        ids = np.ascontiguousarray(records[:, f["low"]]).view("<u2").astype("<i4")
        if self.high_bits:  # the third byte of each id, written in place: several times faster than shift and add
            third = ids.view(np.uint8).reshape(len(ids), self.k, 4)[:, :, 2]
            third[...] = _unpack(records[:, f["high"]], self.high_bits)[:, : self.k]
        head = np.ascontiguousarray(records[:, f["head"]]).view("<f2").astype(np.float32)
        tail = -np.ascontiguousarray(records[:, f["tail"]]).view("<f2").astype(np.float32)[:, 0]
        logprobs = np.empty(ids.shape, dtype=np.float32)
        np.negative(head, out=logprobs[:, :HEAD])
        if self.k > HEAD:
            falls = np.take(_FALLS, np.ascontiguousarray(records[:, f["steps"]]), mode="clip").view(np.float32)
            falls = falls[:, : self.k - HEAD]
            sums = torch.from_numpy(falls).cumsum(-1).numpy()
            sums *= -_STEPS[records[:, f["step"]]]
            np.add(sums, logprobs[:, HEAD - 1 : HEAD], out=logprobs[:, HEAD:])
        return TopK(ids, logprobs, tail)


_FALLS = np.stack([_LEVELS[np.arange(256) & 15], _LEVELS[np.arange(256) >> 4]], axis=1).view(np.uint64)[:, 0]
"""The two falls, in steps, that one byte stands for: two float32 looked up as one number."""


def _best_steps(below: Any, start: Any) -> tuple[Any, Any]:
    """Codes of the falls with the step size that errs least, errors weighed by probability."""
    best_error = np.full(len(below), np.inf)
    best_codes = np.zeros(below.shape, dtype=np.uint8)
    best_step = np.zeros(len(below), dtype=np.uint8)
    weight = np.exp(-np.minimum(below, 80.0)) + 1e-12
    for index, step in enumerate(_STEPS):
        codes, error = _steps(below, start, weight, step)
        is_better = error < best_error
        best_error[is_better], best_step[is_better] = error[is_better], index
        best_codes[is_better] = codes[is_better]
    return best_codes, best_step


def _steps(below: Any, start: Any, weight: Any, step: Any) -> tuple[Any, Any]:
    """For one step size: each fall's nearest level, given where the levels before it have led."""
    middles = (_LEVELS[1:] + _LEVELS[:-1]) / 2 * step
    codes = np.empty(below.shape, dtype=np.uint8)
    error, total = np.zeros(len(below)), np.zeros(len(below), dtype=np.float32)
    for i in range(below.shape[1]):
        gap = below[:, i] - start
        code = np.searchsorted(middles, gap - total * step)
        codes[:, i] = code
        total += _LEVELS[code]
        error += weight[:, i] * np.minimum(np.abs(gap - total * step), 1e3) ** 2
    return codes, error


def _pack(values: Any, bits: int) -> Any:
    """Small numbers into bytes, the first in the lowest bits."""
    per = 8 // bits
    width = -(-values.shape[1] // per)
    padded = np.zeros((len(values), width * per), dtype=np.uint8)
    padded[:, : values.shape[1]] = values
    parts = padded.reshape(len(values), width, per)
    out = parts[:, :, 0].copy()
    for i in range(1, per):
        out |= parts[:, :, i] << (bits * i)
    return out


def _unpack(packed: Any, bits: int) -> Any:
    """`_pack` undone, up to the padding at the end."""
    return np.take(_UNPACK[bits], np.ascontiguousarray(packed), mode="clip").view(np.uint8).reshape(len(packed), -1)


def _unpack_table(bits: int) -> Any:
    per = 8 // bits
    values = np.stack([(np.arange(256) >> (bits * i)) & ((1 << bits) - 1) for i in range(per)], axis=1)
    return values.astype(np.uint8).view(f"<u{per}")[:, 0]


_UNPACK = {bits: _unpack_table(bits) for bits in (2, 4, 8)}
