"""One optimiser step, and a draw's worth of them: the same step whatever the plumbing.

The divisor of a step is counted over all its rows before the first backward pass. Every process holds the same rows and
takes its share of the microbatches by index, so neither microbatch size nor the number of processes can change it.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tutelage.data.collate import Batch, collate
from tutelage.data.pack import microbatches
from tutelage.errors import NumericsError
from tutelage.numerics.logprobs import shape_logits, target_logprobs
from tutelage.train.distributed import Processes
from tutelage.train.optim import Optimizer, learning_rate
from tutelage.types import Signal, StepRecord, TargetRow, Targets, Trajectory, seed_for

OF_SIGNAL = "signal:"
"""Marks sums that a signal keeps for itself (`take_sums`), to be turned into its own metrics."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What one stage's updates need besides source and signal."""

    lr: float
    batch_size: int | None
    """Trajectories per optimiser step; None takes the whole draw in one."""
    epochs: int = 1
    updates: int | None = None
    """Updates in the stage's first round, over as many epochs as that takes; None takes whole epochs."""
    updates_growth: float = 1.0
    """Each later round has this many times as many."""
    schedule: str = "cosine"
    warmup: float = 0.0
    max_grad_norm: float | None = 1.0
    max_tokens: int = 2048
    """Most tokens in one microbatch, padding included; a longer trajectory goes alone."""
    layout: Literal["packed", "padded"] = "packed"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a plan an update happens: it seeds the order of the rows and moves the schedule."""

    seed: int
    stage: int
    round: int
    turn: int = 0
    """The round itself; `round` stays 0 where every round starts afresh."""
    num_rounds: int
    """Rounds the schedule spans: the stage's where weights continue, 1 where every round starts afresh."""


class Trainer:
    """Holds the trained policy and its optimiser; turns prepared targets into updates."""

    def __init__(self, policy: Any, optimizer: Optimizer, *, processes: Processes, device: str = "cpu") -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.processes = processes
        self.device = device

    @property
    def float_dtype(self) -> torch.dtype:
        """Columns of numbers are float32, or float64 where the policy is."""
        weight = self.policy.output_layer.weight_VD
        return torch.float64 if weight.dtype == torch.float64 else torch.float32

    # -- steps ---------------------------------------------------------------------------------

    def steps(
        self, targets: Targets, signal: Signal, settings: TrainerSettings, place: Place, *, done: int = 0
    ) -> Iterator[StepRecord]:
        """Update once per batch of rows, yielding after each; the first `done` updates are skipped (resume)."""
        plan = self.batches(targets.rows, settings, place)
        for index in range(done, len(plan)):
            started = time.perf_counter()
            progress = (place.round + (index + 0.5) / len(plan)) / place.num_rounds  # no update at a rate of 0
            lr = learning_rate(settings.lr, progress, schedule=settings.schedule, warmup=settings.warmup)
            rows = [targets.rows[i] for i in plan[index]]
            key = (place.seed, place.stage, place.turn, index)
            metrics = self.step(rows, signal, settings, lr=lr, key=key)
            signal.after_step(self.policy)
            metrics["time/step_s"] = time.perf_counter() - started
            yield StepRecord(stage=place.stage, round=place.round, step=index, metrics=metrics)

    def batches(self, rows: Sequence[TargetRow], settings: TrainerSettings, place: Place) -> list[list[int]]:
        """Row indices of every update of the round: a fresh order each epoch, fixed by (seed, stage, round, epoch)."""
        size = settings.batch_size or max(1, len(rows))
        per_epoch = -(-len(rows) // size)
        epochs, most = settings.epochs, None
        if settings.updates is not None and per_epoch:
            most = round(settings.updates * settings.updates_growth**place.turn)
            epochs = -(-most // per_epoch)
        out: list[list[int]] = []
        for epoch in range(epochs):
            rng = np.random.default_rng(seed_for(place.seed, place.stage, place.round, epoch, "order"))
            order = rng.permutation(len(rows)) if len(rows) > size else np.arange(len(rows))
            out += [order[start : start + size].tolist() for start in range(0, len(rows), size)]
        out = out[:most]
        is_trained = getattr(rows, "is_trained", None)  # known without making the rows where they lie on disk
        if is_trained is not None:
            return [b for b in out if is_trained[b].any()]
        return [b for b in out if any(rows[i].is_trained for i in b)]

    def step(
        self,
        rows: Sequence[TargetRow],
        signal: Signal,
        settings: TrainerSettings,
        *,
        lr: float,
        key: tuple[int, ...] = (),
    ) -> dict[str, float]:
        """One update on the given rows.

        Args:
            key: names the update. Dropout masks follow from it and the microbatch's index, and from nothing else.

        Raises:
            NumericsError: the loss or the gradient is not finite, or nothing counts. Nothing has been updated.
        """
        divisor = float(sum(r.count for r in rows))
        if divisor <= 0:
            raise NumericsError(
                f"the divisor of a step must be positive, got {divisor:g} over {len(rows)} trajectories: there is "
                "nothing to train on. Check the mask, the acceptance rate and truncation."
            )
        self.policy.train()
        self.optimizer.zero_grad()
        trained = [r for r in rows if r.is_trained]
        sums: dict[str, float] = {"loss": 0.0, "entropy": 0.0, "correct": 0.0, "targets": 0.0, "tokens": 0.0}
        parts = microbatches(trained, max_tokens=settings.max_tokens, layout=settings.layout)
        for index, part in self.processes.share(list(enumerate(parts))):
            batch = collate(part, layout=settings.layout, dtype=self.float_dtype).to(self.device)
            with self._seeded(*key, index):
                with torch.no_grad():
                    batch = batch.with_columns(signal.annotate(batch))
                loss, stats = self.policy(batch, signal.loss, divisor=divisor, stats_fn=target_stats)
                loss.backward()
            sums["loss"] += loss.item()
            sums["tokens"] += sum(r.trajectory.num_tokens for r in part)
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        self._keep_pace(trained, len(parts), settings.layout)
        if (take_sums := getattr(signal, "take_sums", None)) is not None:
            sums |= {f"{OF_SIGNAL}{name}": float(value) for name, value in take_sums().items()}
        sums = self.processes.sum_numbers(sums)
        if not math.isfinite(sums["loss"]):
            raise NumericsError(
                f"the loss must be finite, got {sums['loss']}; nothing was updated. First trajectories of this step: "
                + ", ".join(r.trajectory.id for r in trained[:4])
            )
        if not self.optimizer.is_sharded:  # else summed part by part, in each backward pass
            self.processes.sum_tensors(self.optimizer.gradients().values())
        norm = self.optimizer.step(lr, max_grad_norm=settings.max_grad_norm)
        n = max(1.0, sums["targets"])
        out = {
            "train/loss": sums["loss"],
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/entropy_nats_per_target": sums["entropy"] / n,
            "train/frac_top1": sums["correct"] / n,
            "data/num_targets": sums["targets"],
            "data/num_tokens": sums["tokens"],
            "data/num_trajectories": float(len(trained)),
        }
        known = {"loss", "entropy", "correct", "targets", "tokens"}
        own = {name[len(OF_SIGNAL) :]: value for name, value in sums.items() if name.startswith(OF_SIGNAL)}
        if own:
            out |= signal.metrics(own)  # type: ignore[attr-defined]
        known |= {name for name in sums if name.startswith(OF_SIGNAL)}
        out |= {f"train/{name}": value / n for name, value in sums.items() if name not in known}
        return out

    @contextmanager
    def _seeded(self, *key: int) -> Iterator[None]:
        """Within it torch draws by this key; what it draws after is as if nothing had been drawn."""
        device = torch.device(self.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_for(*key, "dropout"))
            yield

    def _keep_pace(self, rows: Sequence[TargetRow], num_parts: int, layout: Literal["packed", "padded"]) -> None:
        """Sharded weights are gathered by all processes together, so all run equally many forward and backward
        passes: where others have a microbatch more, this one runs a short row that counts for nothing."""
        if not self.optimizer.is_sharded:
            return
        for _ in range(self.processes.idle_turns(num_parts)):
            batch = collate([_shortest(rows)], layout=layout, dtype=self.float_dtype).to(self.device)
            nothing = torch.zeros_like(batch.columns["weight_C"])
            loss, _ = self.policy(batch.with_columns({"weight_C": nothing}), _no_loss, divisor=1.0)
            loss.backward()

    # -- scoring -------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, trajectories: Sequence[Trajectory], *, max_tokens: int = 4096) -> list[Sequence[float]]:
        """Nats per target token of each trajectory under the current weights, shaped as the span was sampled.

        All processes score their share and hold all results.
        """
        was_training = self.policy.training
        self.policy.eval()
        rows = [
            TargetRow(trajectory=t, columns={"weight_C": np.ones(t.num_targets), **_shaping(t)}, count=t.num_targets)
            for t in trajectories
        ]
        numbered = list(enumerate(rows))
        out: dict[int, list[float]] = {}
        layout: Literal["packed", "padded"] = "packed" if self.policy.supports_packing else "padded"
        parts = microbatches(
            numbered, max_tokens=max_tokens, length=lambda pair: pair[1].trajectory.num_tokens, layout=layout
        )
        for part in self.processes.share(parts):
            batch = collate([row for _, row in part], layout=layout, dtype=self.float_dtype).to(self.device)
            scores = self._score_batch(batch)
            for place, (index, row) in enumerate(part):
                own = batch.row_index_C == place
                out[index] = [0.0] * row.trajectory.num_targets
                where = batch.target_index_C[own].tolist()
                for i, value in zip(where, scores[own].tolist(), strict=True):
                    out[index][i] = value
        for _ in range(self.processes.idle_turns(len(parts)) if self.optimizer.is_sharded else 0):
            self._score_batch(collate([_shortest(rows)], layout=layout, dtype=self.float_dtype).to(self.device))
        self.policy.train(was_training)
        merged = self.processes.gather_dict(out)
        return [merged[i] for i in range(len(rows))]

    def _score_batch(self, batch: Batch) -> Tensor:
        scores: Tensor = self.policy.per_target(batch, _shaped_logprobs)
        return scores


def _shortest(rows: Sequence[TargetRow]) -> TargetRow:
    return min((r for r in rows if r.trajectory.num_targets), key=lambda r: r.trajectory.num_tokens)


def _no_loss(student_logits_CV: Tensor, targets_C: Mapping[str, Any]) -> Tensor:
    return student_logits_CV.sum(-1)


def _shaping(trajectory: Trajectory) -> dict[str, np.ndarray]:
    """Temperature and top-p of each target, as it was sampled; 1 where the span does not say."""
    temperature: list[float] = []
    top_p: list[float] = []
    for span in trajectory.spans:
        if span.is_trainable:
            shaped = span.sampling is not None and not span.sampling.is_greedy
            temperature += [span.sampling.temperature if shaped and span.sampling else 1.0] * len(span.token_ids)
            top_p += [span.sampling.top_p if shaped and span.sampling else 1.0] * len(span.token_ids)
    skip = len(temperature) - trajectory.num_targets  # the very first token is never a target
    return {"temperature_C": np.array(temperature[skip:]), "top_p_C": np.array(top_p[skip:])}


def _shaped_logprobs(logits_CV: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """(C,) nats under the distribution each target was sampled from."""
    out = torch.zeros(logits_CV.shape[0], dtype=logits_CV.dtype, device=logits_CV.device)
    pairs = torch.stack([columns["temperature_C"], columns["top_p_C"]], dim=1)
    for temperature, top_p in pairs.unique(dim=0).tolist():
        own = (pairs[:, 0] == temperature) & (pairs[:, 1] == top_p)
        shaped = shape_logits(logits_CV[own], temperature=temperature, top_p=top_p)
        out[own] = target_logprobs(shaped, columns["target_ids_C"][own])
    return out


def target_stats(student_logits_CV: Tensor, targets_C: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sums over a chunk: targets, exact entropy (nats), and targets no token is more likely than."""
    is_trained_C = targets_C["weight_C"] != 0
    # As `numerics.entropy` and an argmax would have it, in fewer passes over the vocabulary.
    logprobs_CV = student_logits_CV.log_softmax(-1)
    hit_C = logprobs_CV.gather(-1, targets_C["target_ids_C"].unsqueeze(-1)).squeeze(-1) >= logprobs_CV.amax(-1)
    probs_CV = logprobs_CV.exp()
    lowest = torch.finfo(logprobs_CV.dtype).min  # 0 * -inf is nan, 0 * lowest is 0
    entropy_C = probs_CV.mul_(logprobs_CV.clamp_min_(lowest)).sum(-1).neg_()
    return {
        "targets": is_trained_C.sum(),
        "entropy": torch.where(is_trained_C, entropy_C, 0.0).sum(),
        "correct": (hit_C & is_trained_C).sum(),
    }
