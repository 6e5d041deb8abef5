"""Answers to reasoning-gym tasks, scored by the task's own grader."""

import json
import math
import re
import warnings
from typing import Any

from . import Payload, Result, accept, error, reject, shown
from .text import EXTRACTORS

REFUSED = {
    "game_of_life_halting": "its grader gives 1.0 to every non-empty answer",
    "puzzle24": "its grader takes any four numbers in range that make 24, not the four of the question",
    "composite": "its entries belong to other tasks; load those tasks by their own names",
}
"""Tasks whose verdicts would mean nothing."""

MANY_ANSWERS = {
    "boxnet", "countdown", "graph_color", "intermediate_integration", "jugs", "knight_swap", "mahjong_puzzle",
    "n_queens", "polynomial_equations", "propositional_logic", "quantum_lock", "rubiks_cube", "rush_hour",
    "simple_integration", "sokoban", "survo", "tower_of_hanoi", "tsumego", "word_ladder",
}  # fmt: skip
"""Tasks with several right answers: there the answer is what makes two solutions different."""

# Graders that evaluate the answer's text as Python. What they may see is a closed list of characters and names: no
# attribute, call or keyword can be written with it.
_LISTS = re.compile(r"[\w\s,\[\]'\".+-]*")
_ARITHMETIC = re.compile(r"(?!.*\*\s*\*)[0-9\s()+*/.-]*", re.DOTALL)
_ALGEBRA = re.compile(r"[\w\s()+*/^.-]*")
EVALUATING = {
    "binary_matrix": _LISTS,
    "n_queens": _LISTS,
    "spiral_matrix": _LISTS,
    "string_insertion": _LISTS,
    "countdown": _ARITHMETIC,
    "polynomial_multiplication": _ALGEBRA,
    "simple_integration": _ALGEBRA,
    "intermediate_integration": _ALGEBRA,
}
_FUNCTIONS = {
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln",
    "sqrt", "pi", "Abs",
}  # fmt: skip
_MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, AssertionError)
"""What graders raise on an answer of the wrong form."""


class GymJudge:
    """Accepts where the task's `score_answer` gives at least `threshold`.

    Below 1 most graders pay for an answer that merely contains the right one, so the default is 1.

    A grader that raises one of `_MALFORMED` on the answer, and not on the gold answer, has said that the answer is
    malformed: rejected. Anything else it raises is an error verdict.
    """

    def __init__(self, *, threshold: float = 1.0, extract: str = "whole", key: str = "auto") -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a dependency compares strings by `is`
            import reasoning_gym
        self._library: Any = reasoning_gym
        self.threshold, self.extract, self.key = threshold, EXTRACTORS[extract], key
        self._scorers: dict[str, Any] = {}

    def isolates(self, payload: Payload) -> bool:
        return (payload.get("gym") or {}).get("name") in EVALUATING

    def prepare(self, payload: Payload) -> None:
        """Build the task's scorer, which sees the task's settings and nothing that the model wrote."""
        gym = payload.get("gym")
        if gym and gym.get("name") not in REFUSED:
            self._scorer(gym)

    def judge(self, payload: Payload) -> Result:
        gym = payload.get("gym")
        if not gym or "name" not in gym:
            return error('the task has no metadata["reasoning_gym"] with the name and entry it was made from')
        name = gym["name"]
        if name in REFUSED:
            return error(f"reasoning-gym's {name} is refused: {REFUSED[name]}")
        answer = self.extract(payload["completion"])
        if answer is None:
            return reject("no answer found")
        is_many = name in MANY_ANSWERS if self.key == "auto" else self.key == "answer"
        key = " ".join(answer.split()) if is_many else None
        if name in EVALUATING and not is_plain(name, answer):
            return reject(f"answer {shown(answer)} has more in it than the grader of {name} may evaluate", key)
        dataset, entry = self._scorer(gym), self._entry(gym)
        try:
            score = dataset.score_answer(answer, entry)
        except _MALFORMED as e:
            if self._gold_passes(dataset, entry):
                return reject(f"answer {shown(answer)} is malformed: {type(e).__name__}: {str(e)[:80]}", key)
            return error(f"the grader of {name} raised {type(e).__name__}: {str(e)[:200]}")
        return self._read(score, answer, entry, key)

    def _read(self, score: Any, answer: str, entry: dict[str, Any], key: str | None) -> Result:
        try:
            score = float(score)
        except (TypeError, ValueError):
            return error(f"the grader gave {score!r:.40}, not a number")
        if not math.isfinite(score) or not 0 <= score <= 1:
            return error(f"the grader gave {score}, not a number in [0, 1]")
        if score >= self.threshold:
            return accept(f"answer {shown(answer)}", key, score)
        return reject(f"answer {shown(answer)} scores {score:g}, gold {shown(str(entry.get('answer')))}", key, score)

    def _scorer(self, gym: Any) -> Any:
        """The data set whose `score_answer` grades; for an entry that is made again, the very one it came from."""
        made_from = {k: gym[k] for k in ("seed", "size")} if "entry" not in gym else {"seed": 0, "size": 1}
        settings = {**(gym.get("config") or {}), **made_from}
        which = json.dumps([gym["name"], settings], sort_keys=True)
        if which not in self._scorers:
            if len(self._scorers) >= 64:
                self._scorers.clear()
            self._scorers[which] = self._library.create_dataset(gym["name"], **settings)
        return self._scorers[which]

    def _entry(self, gym: Any) -> dict[str, Any]:
        """The stored entry, or for entries that JSON cannot hold, the entry made again."""
        entry: dict[str, Any] = gym["entry"] if "entry" in gym else self._scorer(gym)[gym["index"]]
        return entry

    def _gold_passes(self, dataset: Any, entry: dict[str, Any]) -> bool:
        if entry.get("answer") is None:
            return True
        try:
            return float(dataset.score_answer(entry["answer"], entry)) >= self.threshold
        except Exception:  # the entry itself is what the grader cannot read: not the answer's fault
            return False


def is_plain(name: str, answer: str) -> bool:
    """False where the answer holds more than the literals and arithmetic that the task asks for."""
    allowed = EVALUATING[name]
    if len(answer) > 20_000 or not allowed.fullmatch(answer) or "__" in answer:
        return False
    if allowed is _LISTS:
        return re.search(r"\.\s*[^\W\d]", re.sub(r"'[^']*'|\"[^\"]*\"", "", answer)) is None
    names = re.findall(r"[^\W\d]\w*", answer)
    return re.search(r"\.\s*[^\W\d]", answer) is None and all(len(n) == 1 or n in _FUNCTIONS for n in names)
