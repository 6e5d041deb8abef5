"""Reasoning paths: which solutions are the same one, by the equations they write down."""

import ast
import operator
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tutelage.types import Draw, DrawContext, Source, Status, Trajectory, Verdict

_ANNOTATED = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_SIGNS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "−": "-", "–": "-", "€": "$", "£": "$"})
_REWRITES = (
    (r"\\times\b|\\cdot\b", "*"),
    (r"\\div\b", "/"),
    (r"\\(?:left|right)\b|\\(?=[$%])|\\,", ""),
    (r"(?<=\d)\s*x\s*(?=\d)|(?<=[\d)])\s+x\s+(?=[\d($])", " * "),
    (r"(?:(?<=[\s=(])|^)\*\*(?=[\d$(-])|(?<=\d)\*\*(?=\W|$)(?!\s*[\d(])", ""),  # bold
    (r"==", "="),
    (r"\n[ \t]*(?==)", " "),  # one equation over lines, aligned at the signs
)
_EQUALS = re.compile(r"(?<![<>!:=])=(?![>=])")
_IN_EXPRESSION = frozenset("0123456789 \t.,+-*/()$%^:")
_STOP = re.compile(r"[.,:](?=\s|$)")
_BINARY = re.compile(r"(?<=[\d)%])\s*[-+*/^]")
_GOES_ON_BEFORE = re.compile(
    r"(?:[^\s\w\"'“”‘’()\[\]{}|=;!?~,.:>]|\\[A-Za-z]+\s*|\b(?:times|plus|minus|over|by|of|than|per|x)\s+|\d\s+and\s+)\Z"
)
_ENDS_AFTER = re.compile(r"\s*(?:\Z|\n|[\"'”’)\]}|<>=*_~`,.;:?]|\\[^A-Za-z]|\\(?:text|mathrm|q?quad)\b)|\s+[^\W\d_]{2}")
_MORE_AFTER = re.compile(r"\.\.|\s*\(?\s*(?:mod|base|cents?)\b|\s*and\s+\(?\d+/\d|[^\n=.]{0,30}\brem", re.IGNORECASE)
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
        found = read_equations(t.completion)
        verdict: Verdict = replace(t.verdict, key="|".join(f"{e.left}={e.right}" for e in found))
        if self.check:
            for left, right, is_checkable in found:
                if is_checkable and _is_wrong(left, right, self.tolerance):
                    reason = f"accepted answer, but {left}={right} is wrong"
                    verdict = replace(verdict, status=Status.REJECT, score=0.0, reason=reason)
                    break
        return replace(t, verdict=verdict)

    def state(self) -> Mapping[str, Any]:
        return self.source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state)


class Equation(NamedTuple):
    """One `left = right`, spaces removed."""

    left: str
    right: str
    is_checkable: bool
    """Both sides were read whole and say which number they are: no letters, percentages, remainders or powers."""


def equations(text: str) -> list[tuple[str, str]]:
    """Both sides of every equation in order, spaces removed: GSM8K's <<...>> where there are any, else plain ones.

    >>> equations("2 apples and 3: 2 + 3 = 5, then 5 * 4 = 20.")
    [('2+3', '5'), ('5*4', '20')]
    >>> equations("3*4 + 2*6 = 12 + 12 = 24")
    [('3*4+2*6', '12+12'), ('12+12', '24')]
    """
    return [(e.left, e.right) for e in read_equations(text)]


def read_equations(text: str) -> list[Equation]:
    """The equations, and which of them may be checked. Each side of a plain one reaches to the next `=` or to text; the
    left one has an operator and stands on its own (`2x + 3 = 7` has none)."""
    if annotated := _ANNOTATED.findall(text):
        return [Equation(_plain(left), _plain(right), True) for left, right in annotated]
    text = text.translate(_SIGNS)
    for pattern, new in _REWRITES:
        text = re.sub(pattern, new, text)
    found = []
    for sign in _EQUALS.finditer(text):
        (left, is_left_whole), (right, is_right_whole) = _left(text, sign.start()), _right(text, sign.end())
        if left and right:
            is_whole = is_left_whole and is_right_whole and _is_readable(left) and _is_readable(right)
            found.append(Equation(_plain(left), _plain(right), is_whole))
    return found


def _left(text: str, end: int) -> tuple[str, bool]:
    """The expression that ends there and whether all of it was read; empty where there is none."""
    start = end
    while start and text[start - 1] in _IN_EXPRESSION:
        start -= 1
    for stop in _STOP.finditer(text, start, end):
        start = stop.end()
    start = _after_unmatched(text, start, end)
    side = text[start:end].lstrip()
    start = end - len(side)
    before = text[max(0, start - 24) : start]
    if not _BINARY.search(side) or not re.match(r"[\d($.]|-[\d($.]", side):
        return "", False
    if before[-1:].isalnum() or (side[0] == "-" and re.search(r"(?:\b[^\W\d_]|[\])}])\s*\Z", before[-3:])):
        return "", False  # the end of an expression with letters
    return side.rstrip(), not _GOES_ON_BEFORE.search(before)


def _right(text: str, start: int) -> tuple[str, bool]:
    """The expression that begins there and whether all of it was read; empty where there is none."""
    end = start
    while end < len(text) and text[end].isspace():
        end += 1
    start = end
    while end < len(text) and text[end] in _IN_EXPRESSION:
        end += 1
    stop = _STOP.search(text, start, end)
    end = stop.start() if stop else end
    end = _before_unmatched(text, start, end)
    side = text[start:end].rstrip(" \t.,:(")
    number = side.rstrip(" \t+-*/^")
    if not re.match(r"-?[($]*-?[\d.]", side) or not any(c.isdigit() for c in number):
        return "", False
    after = text[start + len(side) :][:40]
    return number, number == side and bool(_ENDS_AFTER.match(after)) and not _MORE_AFTER.match(after)


def _after_unmatched(text: str, start: int, end: int) -> int:
    """Where the expression begins that ends at `end` and has no bracket without its other."""
    depth = 0
    for i in range(end - 1, start - 1, -1):
        depth += (text[i] == ")") - (text[i] == "(")
        if depth < 0:
            return i + 1
    while depth > 0:  # a bracket that was opened before
        start = text.index(")", start) + 1
        depth = text.count(")", start, end) - text.count("(", start, end)
    return start


def _before_unmatched(text: str, start: int, end: int) -> int:
    """Where the expression that begins at `start` has its first bracket without an opening one."""
    depth = 0
    for i in range(start, end):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth < 0:
            return i
    return end


def _is_readable(side: str) -> bool:
    """No percentage (of what?), power, time or ratio, no division by what may be a fraction (6 / 1/2), no two numbers
    side by side."""
    return not re.search(r"[%:^]|/\s*[\d.,]+\s*/|[\d.,]\s+[\d.,]", side)


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
