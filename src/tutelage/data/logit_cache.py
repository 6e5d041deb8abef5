"""The logit cache: a teacher's next-token distributions on disk, exact top-k plus the mass of the rest.

    FOLDER/cache.json           what it is: teacher and its weights, tokenizer, vocabulary, k, temperature, precision
    FOLDER/chunk-00000.bin      records of fixed size, one a target token, memory-mapped
    FOLDER/chunk-00000.json     where each trajectory's records are, and the round-trip check; written last

A trajectory is found by its token ids and by which of them are targets, so a cache made for other ids, another mask or
another hint cannot be used by mistake. Chunks are written whole; a stopped writer goes on with the missing ones.

Dimension letters:  N  tokens   K  top-k entries   V  vocabulary
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tutelage.data.files import atomic_file, check_exists, write_json
from tutelage.data.logit_codec import Codec, TopK, spread_tail
from tutelage.errors import ConfigError, DataError, NumericsError
from tutelage.types import Progress, Trajectory

__all__ = ["LogitCache", "TopK", "spread_tail", "trajectory_key", "write_logit_cache"]

FORMAT = 1
LOW_ENTROPY_NATS = 0.5
"""Distributions below this entropy are the peaked ones that the cache is to keep nearly whole."""
_AIM = 1e-4


class CacheableTeacher(Protocol):
    """What a cache is written from: `policies.InProcessTeacher`."""

    name: str

    def top_k(self, trajectories: Sequence[Trajectory], k: int, *, temperature: float = 1.0) -> list[TopK]: ...

    def full_logprobs(self, trajectory: Trajectory, limit: int, *, temperature: float = 1.0) -> Any:
        """(at most `limit`, V) log-probabilities at the trajectory's first targets, as a tensor."""


def trajectory_key(trajectory: Trajectory) -> str:
    """32 hex digits: equal for equal token ids with equal targets."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.asarray(trajectory.token_ids, dtype="<i8").tobytes())
    digest.update(np.asarray(trajectory.is_target, dtype=np.uint8).tobytes())
    return digest.hexdigest()


def largest_k(vocab_size: int, max_bytes: int = 220) -> int:
    """The most entries a packed record of at most `max_bytes` holds.

    >>> largest_k(151_936), largest_k(49_152)
    (74, 83)
    """
    k = 1
    while k < vocab_size and Codec(k + 1, vocab_size).record_bytes <= max_bytes:
        k += 1
    return k


def write_logit_cache(
    folder: Path,
    trajectories: Sequence[Trajectory],
    teacher: CacheableTeacher,
    *,
    vocab_size: int,
    tokenizer: str,
    weights: str = "",
    k: int | None = None,
    temperature: float = 1.0,
    precision: str = "packed",
    max_kl: float | None = None,
    chunk_tokens: int = 1 << 16,
    check_tokens: int = 64,
    progress: Progress | None = None,
) -> "LogitCache":
    """Write what a teacher says at every target of the trajectories; goes on where a stopped writer left off.

    Args:
        vocab_size: entries of the (shared) vocabulary.
        tokenizer: fingerprint of the tokenizer whose ids these are (`ChatText.fingerprint`).
        weights: digest of the teacher's weights; a writer goes on only where it is the same.
        k: entries kept; None takes the most that fit in 220 bytes a token.
        temperature: the teacher's logits are divided by this first. A loss at another temperature cannot use the
            cache: the evenly spread tail would be wrong there.
        precision: "packed", or "float32" / "float64" for every number in full.
        max_kl: refuse to finish where the mean KL of low-entropy tokens to what is stored exceeds this.
        chunk_tokens: target tokens in a chunk, about: what is lost when the writer is stopped.
        check_tokens: tokens of each chunk that are read back and compared with the teacher's whole distribution.

    Raises:
        ConfigError: the folder holds another cache; k or temperature is out of range.
        DataError: a trajectory of another tokenizer, or `max_kl` exceeded.
        NumericsError: reading back does not give what was written.
    """
    codec = Codec(largest_k(vocab_size) if k is None else k, vocab_size, precision)
    if not (0 < temperature < float("inf")):
        raise ConfigError(f"a logit cache's temperature must be above 0, got {temperature}: it divides the logits")
    for t in trajectories:
        _check_tokenizer(t, tokenizer)
    facts = {
        "format": FORMAT,
        "teacher": teacher.name,
        "weights": weights,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "k": codec.k,
        "temperature": temperature,
        "precision": precision,
        "bytes_per_token": codec.record_bytes,
        "trajectories": hashlib.blake2b("".join(trajectory_key(t) for t in trajectories).encode()).hexdigest()[:32],
    }
    _begin(folder, facts)
    chunks = list(_chunks(trajectories, chunk_tokens))
    if progress is not None:
        progress.start("caching the teacher's distributions", sum(t.num_targets for t in trajectories), "tokens")
    for index, chunk in enumerate(chunks):
        if not (folder / f"chunk-{index:05d}.json").exists():
            _write_chunk(folder, index, chunk, teacher, codec, temperature, check_tokens)
        if progress is not None:
            progress.advance(sum(t.num_targets for t in chunk))
    if progress is not None:
        progress.finish()
    write_json(folder / "done.json", {"chunks": len(chunks)}, kept="The chunks are whole.")
    cache = LogitCache(folder, tokenizer=tokenizer, vocab_size=vocab_size)
    low = cache.fidelity["low_entropy"]
    if max_kl is not None and low["mean_kl_nats"] is not None and not low["mean_kl_nats"] <= max_kl:
        raise DataError(
            f"{folder}: on tokens whose teacher entropy is below {LOW_ENTROPY_NATS} nats the cache is "
            f"{low['mean_kl_nats']:.2g} nats from the teacher's whole distribution (mean of {low['num_tokens']}, "
            f"allowed {max_kl:g}): its tail is too heavy for {codec.k} entries. Use a larger k, or the live teacher."
        )
    return cache


class LogitCache:
    """A written cache as a teacher for `TeacherDistribution`.

    Args:
        tokenizer: fingerprint that the cache must have been made with; None does not check.
        vocab_size: rows of the student's output layer; None does not check. The cache may hold fewer: a padded
            vocabulary is cut to what student and teacher share.
        num_ids: entries that the student's tokenizer uses, which the cache must hold; None does not check.

    Raises:
        DataError: there is no finished cache, its tokenizer or vocabulary is another one, or a file is damaged.
    """

    form = "top_k"
    is_lazy = True
    """Read again for each microbatch, not held in memory."""
    is_fixed = True
    spreads_tail = True
    """Stands for the whole vocabulary: what the top-k leaves is spread evenly."""

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        num_ids: int | None = None,
    ) -> None:
        check_exists(folder / "cache.json", "a logit cache")
        self.folder = folder
        self.facts: Mapping[str, Any] = json.loads((folder / "cache.json").read_text())
        if self.facts.get("format") != FORMAT:
            raise DataError(f"{folder}: logit cache of format {self.facts.get('format')}, this reads {FORMAT}")
        if not (folder / "done.json").exists():
            raise DataError(f"{folder}: this logit cache is not finished; run the same command again and it goes on")
        self.name = str(self.facts["teacher"])
        self.weights = str(self.facts.get("weights", ""))
        """Digest of the teacher's weights; empty where the writer gave none."""
        self.k, self.temperature = int(self.facts["k"]), float(self.facts["temperature"])
        self.vocab_size = int(self.facts["vocab_size"])
        if tokenizer is not None and self.facts["tokenizer"] != tokenizer:
            raise DataError(
                f"{folder}: the cache was made with tokenizer {self.facts['tokenizer']!r}, and the student has "
                f"{tokenizer!r}: its ids mean other tokens. Make a cache with the student's tokenizer."
            )
        self._check_width(vocab_size, num_ids)
        self.codec = Codec(self.k, self.vocab_size, str(self.facts["precision"]))
        self._records: list[Any] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        self._checks: list[Mapping[str, Any]] = []
        for index in range(json.loads((folder / "done.json").read_text())["chunks"]):
            self._open(index)

    def _check_width(self, vocab_size: int | None, num_ids: int | None) -> None:
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise DataError(
                f"{self.folder}: the cache spreads mass over {self.vocab_size} entries, and the student's output "
                f"layer has {vocab_size}. Write it again with --student STUDENT: it then holds what both share."
            )
        if num_ids is not None and self.vocab_size < num_ids:
            raise DataError(
                f"{self.folder}: the cache has {self.vocab_size} entries, and the student's tokenizer has ids up to "
                f"{num_ids - 1}: the teacher is missing tokens that the student can write"
            )

    def _open(self, index: int) -> None:
        path = self.folder / f"chunk-{index:05d}.bin"
        about = json.loads(path.with_suffix(".json").read_text())
        size = int(about["num_tokens"]) * self.codec.record_bytes
        if not path.is_file() or path.stat().st_size != size:
            got = path.stat().st_size if path.is_file() else 0
            raise DataError(
                f"{path} must have {size} bytes, has {got}: remove {path.stem}.json and write the cache again"
            )
        shape = (int(about["num_tokens"]), self.codec.record_bytes)
        self._records.append(np.memmap(path, np.uint8, "r", shape=shape) if size else np.zeros(shape, np.uint8))
        start = 0
        for key, count in zip(about["keys"], about["counts"], strict=True):
            self._places[key] = (index, start, start + count)
            start += count
        self._checks.append(about["check"])

    def __len__(self) -> int:
        """Trajectories in the cache."""
        return len(self._places)

    @property
    def num_tokens(self) -> int:
        return sum(len(r) for r in self._records)

    @property
    def fidelity(self) -> dict[str, dict[str, Any]]:
        """KL from the teacher's whole distribution to what the cache gives back, measured while it was written.

        "low_entropy" (teacher below 0.5 nats) and "all": tokens checked, mean and largest KL in nats.
        """
        out: dict[str, dict[str, Any]] = {}
        for part in ("low_entropy", "all"):
            found = [c[part] for c in self._checks if c[part]["num_tokens"]]
            n = sum(f["num_tokens"] for f in found)
            out[part] = {
                "num_tokens": n,
                "mean_kl_nats": sum(f["sum_kl_nats"] for f in found) / n if n else None,
                "max_kl_nats": max(f["max_kl_nats"] for f in found) if n else None,
            }
        out["low_entropy"]["is_within_aim"] = n_within(out["low_entropy"]["mean_kl_nats"])
        return out

    def top_k(self, trajectories: Sequence[Trajectory]) -> list[TopK]:
        """What the teacher said at every target of each trajectory.

        Raises:
            DataError: a trajectory is not in the cache, or has another tokenizer's ids.
        """
        places = []
        for t in trajectories:
            _check_tokenizer(t, str(self.facts["tokenizer"]))
            place = self._places.get(trajectory_key(t))
            if place is None:
                raise DataError(
                    f"trajectory {t.id!r} ({t.num_tokens} tokens, {t.num_targets} targets) is not in the logit cache "
                    f"{self.folder} of {len(self)} trajectories: its ids, its targets or its prompt are others. "
                    "Write the cache for the trajectories that are trained on."
                )
            places.append(place)
        if not places:
            return []
        records = np.concatenate([self._records[chunk][start:stop] for chunk, start, stop in places])
        whole = self.codec.decode(records)
        ends = np.cumsum([stop - start for _, start, stop in places])[:-1]
        return [TopK(*parts) for parts in zip(*(np.split(column, ends) for column in whole), strict=True)]


def n_within(mean_kl: float | None) -> bool | None:
    """Whether the cache is as near the teacher as it aims to be on peaked distributions; None if unknown."""
    return None if mean_kl is None else mean_kl < _AIM


def _begin(folder: Path, facts: Mapping[str, Any]) -> None:
    """A new cache's description, or a check that the one there is the same."""
    path = folder / "cache.json"
    if path.exists():
        there = json.loads(path.read_text())
        odd = [f"{n} {there.get(n)!r} there, {v!r} wanted" for n, v in facts.items() if there.get(n) != v]
        if odd:
            raise ConfigError(f"{folder} holds another logit cache ({'; '.join(odd)}): choose another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, facts, kept="Nothing was written.")


def _chunks(trajectories: Sequence[Trajectory], chunk_tokens: int) -> Iterator[list[Trajectory]]:
    """Consecutive trajectories with about that many targets together. Each trajectory once."""
    chunk: list[Trajectory] = []
    size, seen = 0, set()
    for t in trajectories:
        if (key := trajectory_key(t)) in seen:
            continue
        seen.add(key)
        chunk.append(t)
        size += t.num_targets
        if size >= chunk_tokens:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_chunk(
    folder: Path,
    index: int,
    chunk: Sequence[Trajectory],
    teacher: CacheableTeacher,
    codec: Codec,
    temperature: float,
    check_tokens: int,
) -> None:
    answers = teacher.top_k(chunk, codec.k, temperature=temperature)
    records = [codec.encode(a) for a in answers if len(a.ids)]
    everything = np.concatenate([np.zeros((0, codec.record_bytes), np.uint8), *records])
    path = folder / f"chunk-{index:05d}.bin"
    with atomic_file(path, kept="Earlier chunks are whole.") as file:
        file.write(everything.tobytes())
    about = {
        "num_tokens": len(everything),
        "keys": [trajectory_key(t) for t in chunk],
        "counts": [len(a.ids) for a in answers],
        "check": _round_trip(path, chunk, answers, teacher, codec, temperature, check_tokens),
    }
    write_json(path.with_suffix(".json"), about, kept="Earlier chunks are whole.")


def _round_trip(
    path: Path,
    chunk: Sequence[Trajectory],
    answers: Sequence[TopK],
    teacher: CacheableTeacher,
    codec: Codec,
    temperature: float,
    check_tokens: int,
) -> dict[str, Any]:
    """Read back what was written, against what was given and against the teacher's whole distribution.

    Raises:
        NumericsError: an id changed, or the numbers lost more than their bits explain.
    """
    size = path.stat().st_size
    stored = np.fromfile(path, np.uint8, count=size).reshape(-1, codec.record_bytes)
    starts = np.cumsum([0, *(len(a.ids) for a in answers)])
    kls: list[Any] = []
    entropies: list[Any] = []
    left = check_tokens
    for i in np.random.default_rng(0).permutation(len(chunk)).tolist():
        n = min(left, len(answers[i].ids))
        if n <= 0:
            continue
        left -= n
        back = codec.decode(stored[starts[i] : starts[i] + n])
        given = TopK(*(np.asarray(column)[:n] for column in answers[i]))
        full = teacher.full_logprobs(chunk[i], n, temperature=temperature).double().cpu()
        if not np.array_equal(back.ids, given.ids):
            raise NumericsError(f"{path}: the ids read back for trajectory {chunk[i].id!r} are not those written")
        got, best = (_kl(full, t, codec.vocab_size) for t in (back, given))
        if not bool((got <= best * 1.1 + 1e-3).all()):
            worst = int((got - best).argmax())
            raise NumericsError(
                f"{path}: read back, target {worst} of trajectory {chunk[i].id!r} is {got[worst]:.3g} nats from the "
                f"teacher, and {best[worst]:.3g} before its numbers were shortened"
            )
        kls.append(got.numpy())
        entropies.append(-(full.exp() * full.clamp_min(-1e4)).sum(-1).numpy())
    kl = np.concatenate([np.zeros(0), *kls])
    is_low = np.concatenate([np.zeros(0), *entropies]) < LOW_ENTROPY_NATS
    return {"low_entropy": _summary(kl[is_low]), "all": _summary(kl)}


def _kl(full_NV: Any, top: TopK, vocab_size: int) -> Any:
    """KL from the teacher's whole distribution to a top-k with an even tail, in nats."""
    ids, logprobs, tail = (torch.from_numpy(np.asarray(column).copy()) for column in top)
    stored_NV = spread_tail(ids.long(), logprobs.double(), tail.double(), vocab_size).log_softmax(-1)
    p_NV = full_NV.exp()
    return (p_NV * torch.where(p_NV > 0, full_NV - stored_NV, 0.0)).sum(-1).clamp_min(0)


def _summary(kl: Any) -> dict[str, Any]:
    if not len(kl):
        return {"num_tokens": 0, "sum_kl_nats": 0.0, "max_kl_nats": 0.0}
    return {"num_tokens": len(kl), "sum_kl_nats": float(kl.sum()), "max_kl_nats": float(kl.max())}


def _check_tokenizer(trajectory: Trajectory, fingerprint: str) -> None:
    if trajectory.tokenizer and trajectory.tokenizer != fingerprint:
        raise DataError(
            f"trajectory {trajectory.id!r} has ids of tokenizer {trajectory.tokenizer}, the logit cache is for "
            f"{fingerprint}: the same ids mean other tokens"
        )
