"""Credentials in what a model read or wrote: flagged when a trajectory is stored, and masked on request.

Patterns of well-known credentials only: a flag is a reason to look, its absence is no promise.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from tutelage.types import Trajectory

SecretPolicy = Literal["flag", "mask", "off"]

_PATTERNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("aws_access_key_id", ("AKIA", "ASIA"), r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"),
    (
        "aws_secret_access_key",
        ("secret_access_key", "SECRET_ACCESS_KEY", "SecretAccessKey"),
        r"(?i)secret_?access_?key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
    ),
    (
        "private_key",
        ("PRIVATE KEY",),
        r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?:"
        r"(?:(?!-----BEGIN)[\s\S]){0,20000}?-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
        r"|(?:\\[nr]|\s)+[A-Za-z0-9+/=]+(?:(?:\\[nr]|\s)+[A-Za-z0-9+/=]{16,})*)",  # cut off before its end
    ),
    (
        "github_token",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})",
    ),
    ("gitlab_token", ("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),
    ("huggingface_token", ("hf_",), r"\bhf_[A-Za-z0-9]{30,}"),
    ("api_key", ("sk-",), r"(?<![A-Za-z0-9_-])sk-(?=[A-Za-z_-]{0,200}[0-9])[A-Za-z0-9_-]{20,}"),
    ("stripe_key", ("_live_",), r"\b[sr]k_live_[A-Za-z0-9]{16,}"),
    ("google_api_key", ("AIza",), r"\bAIza[A-Za-z0-9_-]{35}"),
    ("slack_token", ("xox",), r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),
    ("npm_token", ("npm_",), r"\bnpm_[A-Za-z0-9]{36}"),
    ("jwt", ("eyJ",), r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    ("bearer_token", ("earer ", "EARER "), r"(?i)\bbearer\s+[A-Za-z0-9_.~+/=-]{20,}"),
)
# A start inside a run of the same characters is ruled out before the run is read: searching takes linear time.
_COMPILED = tuple((kind, hints, re.compile(pattern)) for kind, hints, pattern in _PATTERNS)


def find_secrets(text: str) -> dict[str, int]:
    """How many credentials of each kind the text holds; a stretch of text counts once, as the first kind listed."""
    return _masked(text)[1]


def mask_secrets(text: str) -> str:
    """The text with each credential replaced by `[masked KIND]`."""
    return _masked(text)[0]


def guard(trajectory: Trajectory, policy: SecretPolicy) -> Trajectory:
    """The trajectory as it may be stored.

    "flag" adds `extra["secrets"]`, the count of each kind, where there are any. "mask" also replaces them in messages,
    completion, verdict and extra; because the token ids spell the same text, the spans are then removed and the
    trajectory is marked "masked": it can be read, and is not trained on as sampled. "off" looks for nothing.
    """
    if policy == "off":
        return trajectory
    found: dict[str, int] = {}
    messages = _walk(list(trajectory.messages), found)
    own_completion: dict[str, int] = {}
    completion = _walk(trajectory.completion, own_completion if trajectory.messages else found)
    extra = _walk(dict(trajectory.extra), found)
    verdict = trajectory.verdict
    if verdict is not None:
        said: dict[str, int] = {}
        key = None if verdict.key is None else _walk(verdict.key, said)
        verdict = replace(verdict, reason=_walk(verdict.reason, said), key=key)
        own_completion |= said
    # The completion and the verdict repeat what the last message says: they count only where nothing else does.
    found = {**own_completion, **found}
    if not found:
        return trajectory
    flagged = {**trajectory.extra, "secrets": dict(sorted(found.items()))}
    if policy == "flag":
        return replace(trajectory, extra=flagged)
    return replace(
        trajectory,
        messages=tuple(messages),
        completion=completion,
        verdict=verdict,
        extra={**extra, "secrets": flagged["secrets"]},
        spans=(),
        marks=(*trajectory.marks, "masked"),
    )


def _masked(text: str) -> tuple[str, dict[str, int]]:
    found: dict[str, int] = {}
    for kind, hints, pattern in _COMPILED:
        if any(hint in text for hint in hints):
            text, count = pattern.subn(f"[masked {kind}]", text)
            if count:
                found[kind] = count
    return text, found


def _walk(value: Any, found: dict[str, int]) -> Any:
    """The value with its text masked, keys included; what was found is added to `found`."""
    if isinstance(value, str):
        text, here = _masked(value)
        for kind, count in here.items():
            found[kind] = found.get(kind, 0) + count
        return text
    if isinstance(value, Mapping):
        return {(_walk(k, found) if isinstance(k, str) else k): _walk(v, found) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(v, found) for v in value]
    return value
