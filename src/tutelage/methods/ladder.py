"""The ladder's task: chained sums with a scratchpad, an untrained model, and demonstrations.

A question is `3+8-5+9`, an answer works it off from the left: `3+8=11,11-5=6,6+9=15`. Every step counts, not only the
last number: where only that does, keeping one of each text makes lucky answers with wrong steps a large share of
what is kept, and practice makes the model worse.
"""

import json
from pathlib import Path
from random import Random
from typing import NamedTuple

from tutelage.policies.scratch import save_scratch_model

CHARACTERS = "0123456789+-=,"
MODEL, DEMONSTRATIONS, QUESTIONS, HELDOUT = "model", "demonstrations.jsonl", "questions.jsonl", "heldout.jsonl"
FRESH = "fresh.jsonl"
"""Questions for RL that practice has not seen."""


class Sum(NamedTuple):
    """One question with its worked answer."""

    question: str
    worked: str
    answer: str


def write_ladder(
    folder: Path,
    *,
    demonstrations: int = 2500,
    questions: int = 512,
    heldout: int = 896,
    fresh: int = 4096,
    terms: tuple[int, int] = (4, 7),
    error: float = 0.15,
    layers: int = 3,
    width: int = 96,
    seed: int = 0,
) -> int:
    """Model, demonstrations, questions to practise, held-out ones and fresh ones for RL, no two of them the same.

    Returns the number of weights.

    Args:
        terms: fewest and most numbers of a question; demonstrations begin at two.
        error: chance that a step of a demonstration is wrong: what practice with a verifier can mend.
    """
    weights = save_scratch_model(folder / MODEL, characters=CHARACTERS, layers=layers, width=width, seed=seed)
    rng, seen = Random(seed), set[str]()
    shown = _sums(rng, demonstrations, (2, terms[1]), seen, error)
    _write(
        folder / DEMONSTRATIONS,
        [{"prompt": s.question, "completion": s.worked} for s in shown],
    )
    for name, count in ((QUESTIONS, questions), (HELDOUT, heldout), (FRESH, fresh)):
        _write(folder / name, [{"question": s.question, "answer": s.worked} for s in _sums(rng, count, terms, seen)])
    return weights


def _sums(rng: Random, count: int, terms: tuple[int, int], seen: set[str], error: float = 0.0) -> list[Sum]:
    out: list[Sum] = []
    while len(out) < count:
        made = worked_sum(rng, rng.randint(*terms), error=error)
        if made.question not in seen:
            seen.add(made.question)
            out.append(made)
    return out


def worked_sum(rng: Random, terms: int, *, error: float = 0.0) -> Sum:
    """One-digit numbers added and taken away, never below zero on the way.

    Args:
        error: chance that a step of the worked answer is off by one; it goes on from its error.
    """
    while True:
        numbers = [rng.randint(1, 9) for _ in range(terms)]
        signs = [rng.choice("+-") for _ in range(terms - 1)]
        total, exact, steps = numbers[0], numbers[0], []
        for sign, number in zip(signs, numbers[1:], strict=True):
            change = number if sign == "+" else -number
            new, exact = total + change, exact + change
            if error and rng.random() < error:
                new += rng.choice((-1, 1))
            steps.append(f"{total}{sign}{number}={new}")
            total = new
            if min(total, exact) < 0:
                break
        else:
            question = str(numbers[0]) + "".join(f"{s}{n}" for s, n in zip(signs, numbers[1:], strict=True))
            return Sum(question, ",".join(steps), str(exact))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
