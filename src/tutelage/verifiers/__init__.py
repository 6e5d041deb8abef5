"""Accept, reject or error: verifiers, each judging in killable worker processes with limits on time and memory."""

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import ConfigError
from tutelage.verifiers.builtin import (
    KINDS,
    ExactVerifier,
    FlagVerifier,
    GymVerifier,
    LastNumberVerifier,
    MathVerifier,
    PooledVerifier,
    PythonVerifier,
    RegexVerifier,
)
from tutelage.verifiers.pool import Limits, Outcome, WorkerPool

__all__ = [
    "KINDS",
    "ExactVerifier",
    "FlagVerifier",
    "GymVerifier",
    "LastNumberVerifier",
    "Limits",
    "MathVerifier",
    "Outcome",
    "PooledVerifier",
    "PythonVerifier",
    "RegexVerifier",
    "WorkerPool",
    "build_verifier",
]


def build_verifier(
    kind: str, options: Mapping[str, Any] | None = None, *, root: Path | str | None = None
) -> PooledVerifier:
    """The verifier of a configuration: its kind and its settings.

    Args:
        kind: one of `KINDS`, or `module:function` / `path.py:function` for a Python function.
        options: keyword arguments of the kind's class, with `limits` as a mapping.
        root: the project's or configuration's folder, for Python functions.

    Raises:
        ConfigError: an unknown kind or setting (the nearest known one is named), or a wrong value.
        MissingExtra: the kind needs a package that is not installed.
    """
    settings = dict(options or {})
    if ":" in kind:
        settings, kind = {"function": kind, **settings}, "python"
    if kind not in KINDS:
        raise ConfigError(f"unknown verifier {kind!r}{_nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    make = KINDS[kind]
    known = {*_settings(make), *_settings(PooledVerifier)} - {"options", "common", "version"}
    problems = [
        f"verifier {kind!r} has no setting {key!r}{_nearest(key, known)}; known: {', '.join(sorted(known))}"
        for key in settings
        if key not in known
    ]
    limits = settings.get("limits") or {}
    if isinstance(limits, Mapping):
        names = set(_settings(Limits))
        problems += [
            f"verifier {kind!r} has no limit {key!r}{_nearest(key, names)}; known: {', '.join(sorted(names))}"
            for key in limits
            if key not in names
        ]
    if kind == "python":
        settings.setdefault("root", root)
    needed = [
        n for n, p in inspect.signature(make).parameters.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY
    ]
    problems += [f"verifier {kind!r} needs the setting {n!r}" for n in needed if n not in settings]
    if problems:
        raise ConfigError(problems)
    return make(**settings)


def _settings(make: Any) -> list[str]:
    return [n for n in inspect.signature(make).parameters if n != "self"]


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
