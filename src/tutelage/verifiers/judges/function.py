"""A user's own verifier: a Python function of the task, the completion and the trajectory."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from . import Payload, Result, ascii_safe, error

_STATUSES = {"accept", "reject", "error"}


class FunctionJudge:
    """Calls `fn(task, completion, trajectory)` and holds its answer to the contract.

    Allowed: a bool; a number in [0, 1], accepted from `threshold`; a dict with `accepted` (bool) or `status`, and
    optionally `score`, `reason`, `key`. Anything else is an error verdict that says what came instead. Types are
    compared by identity, so an object that claims to equal everything is not a True.
    """

    def __init__(self, *, target: str, threshold: float = 1.0, isolate: bool = True) -> None:
        self.function, self.file = load_function(target)
        self.threshold, self.isolate = threshold, isolate

    def isolates(self, payload: Payload) -> bool:
        return self.isolate

    def prepare(self, payload: Payload) -> None:
        return None

    def judge(self, payload: Payload) -> Result:
        try:
            answer = self.function(payload["task"], payload["completion"], payload["trajectory"])
        except MemoryError:
            return error("the verifier needs more memory than it may have")
        except BaseException as e:
            return error(f"the verifier raised {type(e).__name__}: {_message(e)}{self._where(e)}")
        return read_answer(answer, self.threshold)

    def _where(self, e: BaseException) -> str:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == self.file]
        return f" ({Path(self.file).name}:{lines[-1]})" if lines else ""


def _message(e: BaseException) -> str:
    try:
        return ascii_safe(str(e)).split("\n")[0][:300]
    except BaseException:  # str() of a hostile exception may do anything; the type's name is enough
        return ""


def load_function(target: str) -> tuple[Any, str]:
    """`module:function` or `path.py:function` -> the function and its file."""
    source, _, name = target.rpartition(":")
    if source.endswith(".py"):
        path = Path(source)
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} cannot be loaded as Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"{source} has no function {name!r}")
    return function, str(getattr(module, "__file__", ""))


def read_answer(answer: Any, threshold: float) -> Result:
    """What a user's function returned, as a result; an error where it breaks the contract."""
    kind = type(answer)
    if kind is bool:
        return _result("accept" if answer else "reject", 1.0 if answer else 0.0)
    if kind is int or kind is float:
        problem = _score_problem(answer)
        return problem or _result("accept" if answer >= threshold else "reject", float(answer))
    if kind is not dict:
        return error(f"the verifier returned {_kind(answer)}; it must return a bool, a number in [0, 1] or a dict")
    unknown = [k for k in answer if type(k) is not str or k not in ("accepted", "status", "score", "reason", "key")]
    if unknown:
        return error(
            f"the verifier's dict has unknown keys {unknown[:3]!r}; known: accepted, status, score, reason, key"
        )
    return _read_dict(answer, threshold)


def _read_dict(answer: dict[str, Any], threshold: float) -> Result:
    score = answer.get("score")
    if score is not None and (problem := _score_problem(score)):
        return problem
    for field in ("reason", "key"):
        if answer.get(field) is not None and type(answer[field]) is not str:
            return error(f"the verifier's {field} must be a str, got {_kind(answer[field])}")
    if "accepted" in answer and "status" in answer:
        return error("the verifier's dict has both accepted and status; give one")
    if "accepted" in answer:
        if type(answer["accepted"]) is not bool:
            return error(f"the verifier's accepted must be a bool, got {_kind(answer['accepted'])}")
        status = "accept" if answer["accepted"] else "reject"
    elif "status" in answer:
        if type(answer["status"]) is not str or answer["status"] not in _STATUSES:
            return error(f"the verifier's status must be accept, reject or error, got {_kind(answer['status'])}")
        status = answer["status"]
    elif score is not None:
        status = "accept" if score >= threshold else "reject"
    else:
        return error("the verifier's dict has none of accepted, status, score")
    if status == "error":
        return error(answer.get("reason") or "the verifier could not judge")
    if score is None:
        score = 1.0 if status == "accept" else 0.0
    return _result(status, float(score), answer.get("reason") or "", answer.get("key"))


def _score_problem(score: Any) -> Result | None:
    if type(score) not in (int, float):
        return error(f"the verifier's score must be a number, got {_kind(score)}")
    if not 0 <= score <= 1:  # false for nan too
        return error(f"the verifier's score must be in [0, 1], got {score!r:.40}")
    return None


def _result(status: str, score: float, reason: str = "", key: str | None = None) -> Result:
    return {"status": status, "score": score + 0.0, "reason": reason or f"score {score:g}", "key": key}


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return f"{value!r:.40}" if type(value) in (str, int, float, bool) else f"a {type(value).__name__}"
