"""Mathematical answers, compared by math-verify. Main thread of a worker only: the package refuses to run in others."""

import re
from typing import Any

from . import Payload, Result, accept, error, reject, shown
from .text import equations_key


class MathJudge:
    """Accepts where math-verify finds the answer equal to the gold answer.

    The last `\\boxed{…}` is the answer; without one, what math-verify finds in the whole text (`require_box` rejects
    instead). Its own alarms are off: the worker's limits hold instead, and they also end what an alarm cannot.
    """

    def __init__(self, *, require_box: bool = False, precision: int = 6) -> None:
        import math_verify

        self.require_box, self.precision = require_box, precision
        self._library: Any = math_verify
        self._gold: tuple[str, list[Any]] = ("", [])
        self._targets = (math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig())

    def isolates(self, payload: Payload) -> bool:
        return False

    def prepare(self, payload: Payload) -> None:
        return None

    def judge(self, payload: Payload) -> Result:
        gold, completion = payload["gold"], payload["completion"]
        if gold is None or not gold.strip():
            return error("the task has no gold answer to compare with")
        if self._gold[0] != gold:
            self._gold = (gold, self._parse_gold(gold))
        if not self._gold[1]:
            return error(f"math-verify cannot read the gold answer {shown(gold)}")
        box = last_boxed(completion)
        if box is None and self.require_box:
            return reject("no \\boxed{} in the answer")
        text = completion if box is None else f"\\boxed{{{box}}}"
        found = self._parse(text)
        key = equations_key(completion)
        what = shown(box if box is not None else str(found[-1]) if found else "nothing")
        if not found:
            return reject("math-verify finds no answer", key)
        if self._library.verify(
            self._gold[1], found, float_rounding=self.precision, timeout_seconds=None, raise_on_error=False
        ):
            return accept(f"answer {what}", key)
        return reject(f"answer {what}, gold {shown(gold)}", key)

    def _parse(self, text: str) -> list[Any]:
        found: list[Any] = self._library.parse(text, extraction_config=self._targets, parsing_timeout=None)
        return found

    def _parse_gold(self, gold: str) -> list[Any]:
        """A gold answer is bare LaTeX, a number, or a text that holds a box or dollars."""
        if re.search(r"\\boxed|(?<!\\)\$|\\\(|\\\[", gold):
            return self._parse(gold)
        return self._parse(f"\\boxed{{{gold}}}") or self._parse(gold)


def last_boxed(text: str) -> str | None:
    """What stands in the last complete `\\boxed{…}`, braces matched, or None."""
    start = len(text)
    while (start := text.rfind("\\boxed", 0, start)) >= 0:
        brace = start + len("\\boxed")
        while brace < len(text) and text[brace] == " ":
            brace += 1
        if brace < len(text) and text[brace] == "{":
            depth = 0
            for i in range(brace, len(text)):
                depth += {"{": 1, "}": -1}.get(text[i], 0)
                if depth == 0:
                    return text[brace + 1 : i]
    return None
