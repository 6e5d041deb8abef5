"""Claim 13: rejection-sampling fine-tuning gains with the number of distinct reasoning paths."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.claims.base import Claim, Numbers, Prediction, Predictions
from tutelage.claims.choices import (
    STEPS,
    World,
    copy_of,
    learn,
    logits,
    network,
    prompts,
    sample,
    score,
    weak_base,
)
from tutelage.types import seed_for

Path = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is."""

    questions: int = 200
    ks: tuple[int, ...] = (1, 3, 6, 12, 25, 50, 100)
    base_accuracy: float = 0.088
    epochs: int = 30
    batch: int = 32
    lr: float = 1e-3
    cold: float = 0.05
    """Temperature of the sampler that finds many right answers and few different ones."""
    held_out: int = 2000


def tuned(
    base: nn.Sequential,
    seed: int,
    data: tuple[Tensor, Tensor],
    size: Size,
    *,
    steps: int | None = None,
) -> nn.Sequential:
    """The base fine-tuned on prompts and answers, for the epochs or for a number of updates."""
    policy = copy_of(base, lambda: network(seed))
    optimizer = torch.optim.Adam(policy.parameters(), lr=size.lr)
    generator = torch.Generator().manual_seed(seed_for(seed, "order") % 2**31)
    prompts_ND, answers_NS = data
    wanted, done = num_steps(data, size) if steps is None else steps, 0
    while done < wanted:
        for chosen in torch.randperm(len(prompts_ND), generator=generator).split(size.batch)[: wanted - done]:
            learn(policy, optimizer, prompts_ND[chosen], answers_NS[chosen])
            done += 1
    return policy


def num_steps(data: tuple[Tensor, Tensor], size: Size) -> int:
    """Updates of the epochs."""
    return size.epochs * -(-len(data[0]) // size.batch)


def pooled(prompts_QD: Tensor, gold_QS: Tensor, paths: Sequence[Sequence[Path]]) -> tuple[Tensor, Tensor]:
    """Every prompt with its gold answer and its other paths; gold is not deduplicated against, as in the paper."""
    rows = [q for q, own in enumerate(paths) for _ in range(1 + len(own))]
    answers = [a for gold, own in zip(gold_QS.tolist(), paths, strict=True) for a in (gold, *own)]
    return prompts_QD[rows], torch.tensor(answers)


def accepted_paths(
    policy: nn.Sequential, world: World, prompts_QD: Tensor, k: int, seed: int, temperature: float
) -> list[list[Path | None]]:
    """For each prompt its k samples in order, None where rejected."""
    generator = torch.Generator().manual_seed(seed_for(seed, "paths", str(temperature)) % 2**31)
    with torch.no_grad():
        answers_QGS = sample(logits(policy, prompts_QD), k, generator, temperature=temperature)
    is_right = world.is_right(prompts_QD, answers_QGS).tolist()
    return [
        [tuple(a) if ok else None for a, ok in zip(own, oks, strict=True)]
        for own, oks in zip(answers_QGS.tolist(), is_right, strict=True)
    ]


def measure(seed: int, size: Size = Size()) -> Numbers:
    """Held-out pass@1 of SFT on gold answers, of RFT by samples a question, and of the controls."""
    world = World.of(seed)
    base = weak_base(seed, world, until=size.base_accuracy)
    generator = torch.Generator().manual_seed(seed_for(seed, "questions") % 2**31)
    x_QD, held_PD = prompts(size.questions, generator), prompts(size.held_out, generator)
    gold_QS = 2 * world.pairs(x_QD) + torch.randint(0, 2, (size.questions, STEPS), generator=generator)
    no_paths: list[list[Path]] = [[] for _ in range(size.questions)]
    gold = pooled(x_QD, gold_QS, no_paths)
    sft = tuned(base, seed, gold, size)

    def accuracy(policy: nn.Sequential) -> float:
        return score(policy, world, held_PD).pass_at(1)

    out = {"base": accuracy(base), "sft": accuracy(sft)}
    most = size.ks[-1]
    steps = 0
    for name, temperature in (("_cold", size.cold), ("", 1.0)):
        drawn = accepted_paths(sft, world, x_QD, most, seed, temperature)
        for k in size.ks if not name else (most,):
            accepted = [[p for p in own[:k] if p is not None] for own in drawn]
            unique = [list(dict.fromkeys(own)) for own in accepted]
            data = pooled(x_QD, gold_QS, unique)
            out |= {
                f"rft{name}_k{k}": accuracy(tuned(base, seed, data, size)),
                f"correct{name}_k{k}": sum(map(len, accepted)) / size.questions,
                f"distinct{name}_k{k}": sum(map(len, unique)) / size.questions,
            }
            steps = num_steps(data, size)
    longer = accuracy(tuned(base, seed, gold, size, steps=steps))
    values = [out[f"rft_k{k}"] for k in size.ks]
    rises = [b - a for k, a, b in zip(size.ks, values, values[1:], strict=False) if k >= 3]
    return {
        **out,
        "gain": values[-1] - out["sft"],
        "smallest_rise_from_k3": min(rises),
        "correlation_with_distinct": float(np.corrcoef([out[f"distinct_k{k}"] for k in size.ks], values)[0, 1]),
        "cold_gain_over_warm_gain": (out[f"rft_cold_k{most}"] - out["sft"]) / (values[-1] - out["sft"]),
        "cold_correct_over_warm": out[f"correct_cold_k{most}"] / out[f"correct_k{most}"],
        "sft_with_as_many_updates": longer,
        "gain_at_equal_updates": values[-1] - longer,
    }


CLAIM = Claim(
    name="distinct_paths",
    number=13,
    line="rejection-sampling fine-tuning (RFT) grows with the number of distinct reasoning paths",
    source="Yuan et al. 2023, arXiv:2308.01825: 7B gains with distinct paths; 33B has many right answers, few distinct",
    design=(
        "The network of claim 10: an answer is 4 choices, 16 answers to a question are right, so a path is an answer. "
        "A base of pass@1 0.088 is fine-tuned on one gold answer to each of 200 questions (SFT); SFT samples k = 1 to "
        "100 answers a question at temperature 1; the base is fine-tuned anew on gold plus the distinct accepted "
        "ones, 30 epochs each. Scores are exact, on 2,000 other questions. Predicted: pass@1 rises with every k from "
        "3 on, and follows the number of distinct paths with a correlation above 0.97; 100 samples at temperature "
        "0.05, more of them right, gain less than half of what those at 1 do; and paths are more than further "
        "updates: RFT is ahead of SFT on the gold answers for as many updates."
    ),
    measure=measure,
    judge=Predictions(
        Prediction(name="gain", what="pass@1, RFT at k = 100 minus SFT", above=0.0),
        Prediction(name="smallest_rise_from_k3", what="smallest rise from one k to the next, k >= 3", above=0.0),
        Prediction(name="correlation_with_distinct", what="correlation of pass@1 with distinct paths", above=0.97),
        Prediction(name="cold_gain_over_warm_gain", what="gain of the cold sampler over the warm one's", below=0.5),
        Prediction(name="gain_at_equal_updates", what="pass@1, RFT minus SFT with as many updates", above=0.0),
    ),
    seeds=tuple(range(12)),
    minutes=1.0,
)
