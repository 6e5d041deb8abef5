"""Reasoning paths: which solutions are the same one, by the equations they write down."""

import ast
import operator
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tutelage.types import Draw, DrawContext, Source, Status, Trajectory, Verdict

_ANNOTATED = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_PLAIN = re.compile(
    r"(?<![\w.)+*/×÷-])(?<![+*/×÷-]\s)"  # not the end of a longer expression
    r"(-?[\d(][\d\s.,+\-*/()$%×÷]*[+\-*/×÷][\d\s.,+\-*/()$%×÷]*)=\s*\$?(-?[\d.,]*\d)"
)
_TIMES = re.compile(r"(?<=\d)\s*x\s*(?=\d)")
_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


class Paths:
    """Gives every accepted completion its list of equations as its key, and rejects those with a wrong one.

    With `Keep(distinct="key")` one completion of each path is kept. Completions without an equation share the empty
    key, so one of them is kept. A key that the verifier gave is replaced.

    Args:
        tolerance: largest difference between the two sides of an equation.
        check: False only gives keys.

    Source:
        Yuan et al. 2023 (RFT), arXiv:2308.01825; the key and the tolerance are its released code's.
    """

    def __init__(self, source: Source, *, tolerance: float = 1e-3, check: bool = True) -> None:
        self.source, self.tolerance, self.check = source, tolerance, check

    def draw(self, ctx: DrawContext) -> Draw:
        draw = self.source.draw(ctx)
        new = [self._keyed(t) for t in draw]
        wrong = sum(a.verdict != b.verdict and _is_rejected(b) for a, b in zip(draw, new, strict=True))
        keys = {(t.prompt_index, t.verdict.key) for t in new if t.verdict is not None and t.verdict.is_accepted}
        stats = {"data/num_wrong_equations": float(wrong), "data/num_distinct_paths": float(len(keys))}
        return draw.with_trajectories(new, **stats)

    def _keyed(self, t: Trajectory) -> Trajectory:
        if t.verdict is None or not t.verdict.is_accepted:
            return t
        found = equations(t.completion)
        verdict: Verdict = replace(t.verdict, key="|".join(f"{left}={right}" for left, right in found))
        if self.check:
            for left, right in found:
                if _is_wrong(left, right, self.tolerance):
                    reason = f"accepted answer, but {left}={right} is wrong"
                    verdict = replace(verdict, status=Status.REJECT, score=0.0, reason=reason)
                    break
        return replace(t, verdict=verdict)

    def state(self) -> Mapping[str, Any]:
        return self.source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state)


def equations(text: str) -> list[tuple[str, str]]:
    """Both sides of every equation in order, spaces removed: GSM8K's <<...>> where there are any, else plain ones.

    >>> equations("2 apples and 3: 2 + 3 = 5, then 5 * 4 = 20.")
    [('2+3', '5'), ('5*4', '20')]
    """
    found = _ANNOTATED.findall(text) or _PLAIN.findall(_TIMES.sub(" * ", text))
    return [(_plain(left), _plain(right)) for left, right in found]


def _plain(side: str) -> str:
    kept = re.sub(r"[\s$]", "", side).replace("×", "*").replace("÷", "/")
    return re.sub(r",(?=\d{3})", "", kept)


def _is_wrong(left: str, right: str, tolerance: float) -> bool:
    """Both sides are numbers, and other ones. What cannot be worked out is not held against a completion."""
    a, b = _value(left), _value(right)
    return a is not None and b is not None and not abs(a - b) <= tolerance


def _value(side: str) -> float | None:
    """Arithmetic only; None where it is none. Leading zeros and percent signs are read as people write them."""
    side = re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub(r"(\d+(?:\.\d+)?)%", r"(\1/100)", side))
    try:
        return float(_evaluate(ast.parse(side, mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right)))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_evaluate(node.operand)))
    raise ValueError("no arithmetic")


def _is_rejected(t: Trajectory) -> bool:
    return t.verdict is not None and t.verdict.status is Status.REJECT
