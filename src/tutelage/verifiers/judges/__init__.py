"""What decides a verdict, one module per kind. Standard library only at import, and no import of the rest of the
package: worker processes load this folder by its path and nothing else of tutelage.

A judge takes a payload (JSON values) and returns `{"status", "score", "reason", "key"}`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

Payload = Mapping[str, Any]
Result = dict[str, Any]


class Judge(Protocol):
    def isolates(self, payload: Payload) -> bool:
        """True where judging may run code somebody else wrote: such a verdict gets a process of its own."""

    def prepare(self, payload: Payload) -> None:
        """What may be kept for later payloads. Sees the payload, must not touch what the model wrote in it."""

    def judge(self, payload: Payload) -> Result:
        """The verdict. May raise, hang or die: the process around it makes that an error verdict."""


def build(kind: str, options: Mapping[str, Any]) -> Judge:
    """The judge of one kind, with whatever it needs imported."""
    if kind == "math_verify":
        from .mathematics import MathJudge

        return MathJudge(**options)
    if kind == "reasoning_gym":
        from .gym import GymJudge

        return GymJudge(**options)
    if kind == "python":
        from .function import FunctionJudge

        return FunctionJudge(**options)
    from .text import TEXT_JUDGES

    judge: Judge = TEXT_JUDGES[kind](**options)
    return judge


def accept(reason: str, key: str | None = None, score: float = 1.0) -> Result:
    return {"status": "accept", "score": score, "reason": reason, "key": key}


def reject(reason: str, key: str | None = None, score: float = 0.0) -> Result:
    return {"status": "reject", "score": score, "reason": reason, "key": key}


def error(reason: str) -> Result:
    return {"status": "error", "score": None, "reason": reason, "key": None}


def shown(text: str, limit: int = 60) -> str:
    """The text on one line for a reason: quoted, control characters escaped, cut."""
    return ascii_safe(repr(text if len(text) <= limit else text[:limit] + "…"))


def ascii_safe(text: str) -> str:
    """Lone surrogates as escapes, so that the text can be stored and printed."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
