"""A trajectory as one row of a table, and back, with nothing changed.

What is stored beside what a `Trajectory` holds (`prompt_hash`, `text_hash`, per-token flags, counts, the first
author) is derived: readers without this library, filters and statistics use it, and reading ignores it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tutelage.errors import DataError
from tutelage.types import SamplingParams, Span, Status, Trajectory, Verdict, content_hash

SCHEMA_VERSION = 1
ROLE_CODES = {"system": 0, "user": 1, "assistant": 2, "tool": 3, "template": 4}
OTHER_ROLE = 5

_SPAN = pa.struct(
    [
        pa.field("length", pa.int32(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("author", pa.string(), nullable=False),
        pa.field("is_sampled", pa.bool_(), nullable=False),
        pa.field("is_trainable", pa.bool_(), nullable=False),
        pa.field("has_logprobs", pa.bool_(), nullable=False),
        pa.field("has_entropies", pa.bool_(), nullable=False),
        pa.field("policy_version", pa.string()),
        pa.field("sampling", pa.string()),
        pa.field("is_context_exact", pa.bool_(), nullable=False),
    ]
)


def _field(name: str, kind: pa.DataType, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable)


SCHEMA = pa.schema(
    [
        _field("id", pa.string()),
        _field("task_id", pa.string()),
        _field("task_hash", pa.string()),
        _field("task_name", pa.string()),
        _field("prompt_hash", pa.string()),
        _field("text_hash", pa.string()),
        _field("prompt_index", pa.int64()),
        _field("sample_index", pa.int64()),
        _field("messages", pa.string()),
        _field("completion", pa.string()),
        _field("finish", pa.string()),
        _field("author", pa.string(), True),
        _field("policy_version", pa.string(), True),
        _field("token_ids", pa.list_(pa.int32())),
        _field("role_codes", pa.list_(pa.int8())),
        _field("is_sampled", pa.list_(pa.bool_())),
        _field("is_trainable", pa.list_(pa.bool_())),
        _field("logprobs", pa.list_(pa.float64()), True),
        _field("entropies", pa.list_(pa.float64()), True),
        _field("spans", pa.list_(_SPAN)),
        _field("num_tokens", pa.int32()),
        _field("num_sampled", pa.int32()),
        _field("num_targets", pa.int32()),
        _field("verdict_status", pa.string(), True),
        _field("verdict_score", pa.float64(), True),
        _field("verdict_reason", pa.string(), True),
        _field("verdict_verifier", pa.string(), True),
        _field("verdict_version", pa.string(), True),
        _field("verdict_key", pa.string(), True),
        _field("weight", pa.float64()),
        _field("marks", pa.list_(pa.string())),
        _field("parent", pa.string(), True),
        _field("tokenizer", pa.string()),
        _field("origin", pa.string()),
        _field("licence", pa.string()),
        _field("extra", pa.string()),
        _field("not_utf8", pa.string(), True),
    ],
    metadata={
        "tutelage.schema_version": str(SCHEMA_VERSION),
        "tutelage.role_codes": json.dumps({**ROLE_CODES, "other": OTHER_ROLE}),
    },
)
"""Log-probabilities and entropies are doubles, so that a resumed run sees the bits it would have had. `not_utf8` is
null, or JSON text of the columns whose text UTF-8 cannot hold (lone surrogates); those columns then hold U+FFFD."""

_ROW = pa.struct(list(SCHEMA))
_DERIVED = {
    *("prompt_hash", "text_hash", "author", "policy_version", "role_codes", "is_sampled", "is_trainable"),
    *("num_tokens", "num_sampled", "num_targets"),
}
STORED = tuple(name for name in SCHEMA.names if name not in _DERIVED)
"""Columns a trajectory is read back from."""
_PLAIN = (
    *("id", "task_id", "task_hash", "task_name", "prompt_index", "sample_index", "completion", "finish"),
    *("weight", "parent", "tokenizer", "origin", "licence"),
)


def to_json(value: Any, where: str) -> str:
    """ASCII JSON text of a value, read back equal (tuples as lists).

    Raises:
        DataError: it holds something JSON has no form for; a mapping has keys that are not strings.
    """
    try:
        return json.dumps(_plain(value, where), ensure_ascii=True, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} cannot be written as JSON: {error}. Keep it as text, or leave it out.") from error


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        bad = [k for k in value if not isinstance(k, str)]
        if bad:
            raise DataError(
                f"{where} has the key {bad[0]!r}, a {type(bad[0]).__name__}: JSON keys are text. Use str()."
            )
        return {k: _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    raise DataError(
        f"{where} is a {type(value).__name__}, which JSON has no form for. Store numbers, text, lists and mappings."
    )


def prompt_hash(trajectory: Trajectory) -> str:
    """Hash of what came before the first trained token: its tokens, or the messages before the first assistant's."""
    before: list[int] = []
    for span in trajectory.spans:
        if span.is_trainable:
            break
        before.extend(span.token_ids)
    if trajectory.spans:
        return content_hash(before)
    roles = [m.get("role") for m in trajectory.messages]
    end = roles.index("assistant") if "assistant" in roles else len(roles)
    return content_hash([dict(m) for m in trajectory.messages[:end]])


def to_row(t: Trajectory) -> dict[str, Any]:
    """The columns of one trajectory, as Python values that both Arrow and JSON can hold.

    Raises:
        DataError: `messages` or `extra` hold what JSON cannot.
    """
    spans, v = t.spans, t.verdict
    messages = to_json(t.messages, f"messages of trajectory {t.id}")
    lengths = [len(s.token_ids) for s in spans]
    learned = next((s for s in spans if s.is_trainable), None) or next((s for s in spans if s.is_sampled), None)
    return {
        "id": t.id,
        "task_id": t.task_id,
        "task_hash": t.task_hash,
        "task_name": t.task_name,
        "prompt_hash": prompt_hash(t),
        "text_hash": content_hash(messages if t.messages else t.completion),
        "prompt_index": t.prompt_index,
        "sample_index": t.sample_index,
        "messages": messages,
        "completion": t.completion,
        "finish": t.finish,
        "author": learned.author if learned else None,
        "policy_version": learned.policy_version if learned else None,
        "token_ids": [int(token) for token in t.token_ids],
        "role_codes": _per_token([ROLE_CODES.get(s.role, OTHER_ROLE) for s in spans], lengths),
        "is_sampled": _per_token([s.is_sampled for s in spans], lengths),
        "is_trainable": _per_token([s.is_trainable for s in spans], lengths),
        "logprobs": _values([s.logprobs for s in spans], lengths),
        "entropies": _values([s.entropies for s in spans], lengths),
        "spans": [
            {
                "length": n,
                "role": s.role,
                "author": s.author,
                "is_sampled": s.is_sampled,
                "is_trainable": s.is_trainable,
                "has_logprobs": s.logprobs is not None,
                "has_entropies": s.entropies is not None,
                "policy_version": s.policy_version,
                "sampling": None if s.sampling is None else _sampling_text(s.sampling),
                "is_context_exact": s.is_context_exact,
            }
            for s, n in zip(spans, lengths, strict=True)
        ],
        "num_tokens": sum(lengths),
        "num_sampled": t.num_sampled,
        "num_targets": sum(t.is_target),
        "verdict_status": None if v is None else str(v.status),
        "verdict_score": None if v is None or v.score is None else float(v.score),
        "verdict_reason": None if v is None else v.reason,
        "verdict_verifier": None if v is None else v.verifier,
        "verdict_version": None if v is None else v.version,
        "verdict_key": None if v is None else v.key,
        "weight": float(t.weight),
        "marks": list(t.marks),
        "parent": t.parent,
        "tokenizer": t.tokenizer,
        "origin": t.origin,
        "licence": t.licence,
        "extra": to_json(t.extra, f"extra of trajectory {t.id}"),
    }


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """The trajectory a row was made from, equal to it in every field."""
    ids, logprobs, entropies = row["token_ids"], row["logprobs"], row["entropies"]
    spans, start = [], 0
    for s in row["spans"]:
        stop = start + s["length"]
        spans.append(
            Span(
                token_ids=tuple(ids[start:stop]),
                role=s["role"],
                author=s["author"],
                is_sampled=s["is_sampled"],
                is_trainable=s["is_trainable"],
                logprobs=tuple(logprobs[start:stop]) if s["has_logprobs"] else None,
                entropies=tuple(entropies[start:stop]) if s["has_entropies"] else None,
                policy_version=s["policy_version"],
                sampling=None if s["sampling"] is None else _sampling(s["sampling"]),
                is_context_exact=s["is_context_exact"],
            )
        )
        start = stop
    if start != len(ids):
        raise DataError(f"trajectory {row['id']}: its spans have {start} tokens, its token_ids {len(ids)}")
    verdict = None
    if row["verdict_status"] is not None:
        verdict = Verdict(
            status=Status(row["verdict_status"]),
            score=row["verdict_score"],
            reason=row["verdict_reason"],
            verifier=row["verdict_verifier"],
            version=row["verdict_version"],
            key=row["verdict_key"],
        )
    return Trajectory(
        **{name: row[name] for name in _PLAIN},
        spans=tuple(spans),
        messages=tuple(json.loads(row["messages"])),
        marks=tuple(row["marks"]),
        verdict=verdict,
        extra=json.loads(row["extra"]),
    )


def encode(row: Mapping[str, Any]) -> pa.RecordBatch:
    """One row of `to_row` as Arrow.

    Raises:
        DataError: a value does not fit its column; the message names the trajectory and the column.
    """
    stored, not_utf8 = dict(row), {}
    for name, value in row.items():
        clean = _utf8(value)
        if clean is not value:
            stored[name], not_utf8[name] = clean, value
    stored["not_utf8"] = json.dumps(not_utf8) if not_utf8 else None
    try:
        encoded = pa.array([stored], type=_ROW)
        batch = pa.RecordBatch.from_struct_array(encoded)
        missing = [f.name for f in SCHEMA if not f.nullable and stored[f.name] is None]
        if missing:
            raise TypeError(f"{missing[0]} may not be None")
        return pa.RecordBatch.from_arrays(batch.columns, schema=SCHEMA)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"trajectory {row['id']}: {_misfit(stored) or error}") from error


def _misfit(stored: Mapping[str, Any]) -> str:
    """Which column a row's value does not fit, and why."""
    for field in SCHEMA:
        try:
            pa.array([stored[field.name]], type=field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            return f"{field.name} does not fit its column ({field.type}): {error}"
    return ""


def decode(batch: pa.RecordBatch) -> list[Trajectory]:
    """The trajectories of an Arrow batch that holds at least the columns `STORED`."""
    columns: dict[str, Sequence[Any]] = {}
    for name in STORED:
        column = batch.column(name)
        if name in ("token_ids", "logprobs", "entropies"):
            columns[name] = _lists(column)
        elif name == "spans":
            columns[name] = _structs(column)
        else:
            columns[name] = column.to_pylist()
    out = []
    for i in range(batch.num_rows):
        row = {name: column[i] for name, column in columns.items()}
        if row["not_utf8"] is not None:
            row |= json.loads(row["not_utf8"])
        out.append(from_row(row))
    return out


def _per_token(values: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
    return [v for v, n in zip(values, lengths, strict=True) for _ in range(n)]


def _values(per_span: Sequence[Sequence[float] | None], lengths: Sequence[int]) -> list[float | None] | None:
    """One entry per token, None where its span has none; None where no span has any."""
    if all(values is None for values in per_span):
        return None
    out: list[float | None] = []
    for values, n in zip(per_span, lengths, strict=True):
        out.extend([None] * n if values is None else map(float, values))
    return out


def _sampling_text(s: SamplingParams) -> str:
    fields = {"temperature": s.temperature, "top_p": s.top_p, "max_new_tokens": s.max_new_tokens, "stop": s.stop}
    return to_json(fields, "sampling parameters")


def _sampling(text: str) -> SamplingParams:
    fields = json.loads(text)
    return SamplingParams(**{**fields, "stop": tuple(fields["stop"])})


def _utf8(value: Any) -> Any:
    """The value itself where UTF-8 can hold all its text, else a copy with U+FFFD for what it cannot."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in value)
    elif isinstance(value, list) and value and isinstance(value[0], str | dict):
        clean = [_utf8(v) for v in value]
        return value if all(a is b for a, b in zip(clean, value, strict=True)) else clean
    elif isinstance(value, dict):
        clean_of = {k: _utf8(v) for k, v in value.items()}
        return value if all(clean_of[k] is v for k, v in value.items()) else clean_of
    return value


def _lists(column: pa.Array) -> list[list[Any] | None]:
    """A list column as Python lists; nulls inside read as nan and are never looked at (`has_logprobs` is False)."""
    offsets = column.offsets.to_pylist()
    values = column.values.to_numpy(zero_copy_only=False)
    valid = column.is_valid().to_pylist()
    return [values[offsets[i] : offsets[i + 1]].tolist() if valid[i] else None for i in range(len(column))]


def _structs(column: pa.Array) -> list[list[dict[str, Any]]]:
    offsets, values = column.offsets.to_pylist(), column.values
    names = [field.name for field in _SPAN]
    fields = [values.field(name).to_pylist() for name in names]
    dicts = [dict(zip(names, entry, strict=True)) for entry in zip(*fields, strict=True)]
    return [dicts[offsets[i] : offsets[i + 1]] for i in range(len(column))]
