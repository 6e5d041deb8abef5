"""What a run will need before it is started: memory, tokens, time, and what its samples look like."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tutelage.methods.workbench import Workbench
from tutelage.train.loop import Stage
from tutelage.types import Draw, DrawContext, Span, Trajectory


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Rough figures: they say whether a run fits and whether it takes minutes or days."""

    num_parameters: int
    num_trainable: int
    memory_bytes: int
    """Weights, gradients, optimiser and float32 masters, and one microbatch's activations, about."""
    tokens_sampled_at_most: int
    tokens_trained_at_most: int
    seconds_at_most: float
    """From a measured matrix product of this machine, at a third of its rate."""
    samples: Sequence[Trajectory]

    def to_json(self) -> dict[str, Any]:
        return {
            "num_parameters": self.num_parameters,
            "num_trainable": self.num_trainable,
            "memory_bytes": self.memory_bytes,
            "tokens_sampled_at_most": self.tokens_sampled_at_most,
            "tokens_trained_at_most": self.tokens_trained_at_most,
            "seconds_at_most": self.seconds_at_most,
            "samples": [
                [{"author": s.author, "is_trainable": s.is_trainable, "token_ids": s.token_ids} for s in t.spans]
                for t in self.samples
            ],
        }

    def lines(self) -> list[tuple[str, str]]:
        return [
            ("parameters", f"{self.num_parameters / 1e6:.1f} M, {self.num_trainable / 1e6:.1f} M trained"),
            ("memory", f"about {self.memory_bytes / 2**30:.1f} GiB"),
            ("tokens sampled", f"at most {self.tokens_sampled_at_most:,}"),
            ("tokens trained", f"at most {self.tokens_trained_at_most:,}"),
            ("time", f"at most about {self.seconds_at_most / 60:.0f} min, evaluations apart"),
        ]


def estimate(bench: Workbench, plan: Sequence[tuple[Any, Stage]]) -> Estimate:
    """Figures for a plan (`handover.plan_of`), without training or sampling anything."""
    parameters = list(bench.policy.model.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    sampled = trained = 0
    samples: list[Trajectory] = []
    for settings, stage in plan:
        drawn, targets, shown = _stage_tokens(settings, stage, bench)
        sampled += drawn
        trained += targets
        samples += shown
    rate = _flops_per_second(bench)
    seconds = (6 * total * trained + 2 * total * sampled) / rate if rate else 0.0
    return Estimate(
        num_parameters=total,
        num_trainable=trainable,
        memory_bytes=_memory(parameters, bench, max(s.trainer.max_tokens for _, s in plan)),
        tokens_sampled_at_most=sampled,
        tokens_trained_at_most=trained,
        seconds_at_most=seconds,
        samples=samples[:3],
    )


def _stage_tokens(settings: Any, stage: Stage, bench: Workbench) -> tuple[int, int, list[Trajectory]]:
    rollout = getattr(settings, "rollout", None)
    if rollout is None:  # recorded: the draw is there already
        draw: Draw = stage.source.draw(DrawContext(seed=bench.config.seed, stage=0, round=0, text=bench.text))
        return 0, stage.trainer.epochs * sum(t.num_tokens for t in draw), list(draw)[:3]
    tasks = bench.train_tasks(settings.tasks)
    prompts = rollout.prompts_per_round or len(tasks)
    shown = [_prompt_only(bench, task) for task in tasks[:3]]
    prompt_tokens = sum(t.num_tokens for t in shown) // max(1, len(shown))
    completions = prompts * rollout.n * stage.rounds
    cap = getattr(getattr(settings, "keep", None), "cap", None)
    kept = completions if cap is None else min(completions, prompts * cap * stage.rounds)
    per_sample = prompt_tokens + rollout.max_new_tokens
    return completions * rollout.max_new_tokens, per_sample * _trained_rows(kept, stage), shown


def _trained_rows(kept: int, stage: Stage) -> int:
    """Trajectories that go through an update, each counted as often as it does."""
    s = stage.trainer
    if s.updates is None:
        return kept * s.epochs
    updates = sum(round(s.updates * s.updates_growth**r) for r in range(stage.rounds))
    return updates * (s.batch_size or kept // max(1, stage.rounds))


def _prompt_only(bench: Workbench, task: Any) -> Trajectory:
    spans: list[Span] = bench.text.render_prompt(task)
    return Trajectory(id=task.id, task_id=task.id, task_hash=task.hash, spans=tuple(spans))


def _memory(parameters: Sequence[torch.nn.Parameter], bench: Workbench, max_tokens: int) -> int:
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = [p for p in parameters if p.requires_grad]
    low = sum(p.numel() for p in trained if p.element_size() < 4)
    moments = sum(2 * 4 * p.numel() for p in trained)
    gradients = sum(4 * p.numel() for p in trained)
    config = bench.policy.causal_model.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    activations = 34 * max_tokens * layers * width * (2 if bench.precision == "bfloat16" else 4) // 2
    return int(weights + 4 * low + moments + gradients + activations)


def _flops_per_second(bench: Workbench) -> float:
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(bench.precision, torch.float32)
    a = torch.ones(1024, 1024, dtype=dtype, device=bench.device)
    best = min(_seconds(a) for _ in range(3))
    return 2 * 1024**3 / best / 3


def _seconds(a: torch.Tensor) -> float:
    started = time.perf_counter()
    (a @ a).sum().item()
    return time.perf_counter() - started
