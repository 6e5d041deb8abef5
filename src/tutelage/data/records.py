"""Records of JSONL, JSON and Parquet files, one at a time, each with its line; what is none comes with a reason."""

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.data.files import check_exists
from tutelage.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz", ".parquet")
MAX_RECORD_BYTES = 256 * 2**20
"""A longer line is not read into memory; it is reported."""
MAX_DIGITS = 4300
"""Python reads no longer integers from text."""

_SPACE = re.compile(r"[ \t\n\r]*")


class Record(NamedTuple):
    """One record of a file, or why it is none."""

    line: int
    """Where it starts: line of the file from 1; row number from 1 in a Parquet file."""
    raw: str
    """Its text as it stands in the file (of a long one, the beginning)."""
    value: dict[str, Any] | None
    """The record; None where it cannot be read."""
    reason: str = ""
    """Why it cannot be read."""


class _NotARecord(ValueError):
    """Valid to a lenient reader, and still not what the file's author can have meant."""


def data_files(path: Path) -> list[Path]:
    """The file itself, or every readable file below the folder, sorted.

    Raises:
        DataError: nothing is there; the name says nothing this library reads; the folder holds no such file.
    """
    check_exists(path, "data")
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) and not p.name.startswith("."))
        if not found:
            names = sorted(p.name for p in path.iterdir())[:5]
            raise DataError(f"{path} holds no file ending in {', '.join(SUFFIXES)}; it holds {names or 'nothing'}")
        return found
    if not _suffix(path):
        raise DataError(f"{path.name} must end in one of {', '.join(SUFFIXES)}, so that its format is known; rename it")
    return [path]


def iter_records(path: Path) -> Iterator[Record]:
    """Every record of one file in order. Blank lines are no records.

    A JSON file is an array of records, one record, or (whatever its name says) one record a line. JSON is read
    strictly: a key twice, NaN, a number beyond a double's range, an integer of more than 4300 digits or text that is
    not UTF-8 makes a record unreadable. A byte order mark and CRLF are accepted.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        with cast(IO[bytes], gzip.open(path, "rb") if suffix.endswith(".gz") else open(path, "rb")) as file:
            if suffix.startswith(".json") and not suffix.startswith(".jsonl"):
                yield from _json(file.read())
            else:
                yield from _lines(file)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def parse_json(text: str) -> Any:
    """A value of strict JSON.

    Raises:
        ValueError: with the reason as its text.
    """
    try:
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error


def _suffix(path: Path) -> str:
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [k for k, _ in pairs]
        raise _NotARecord(f'the key "{next(k for k in keys if keys.count(k) > 1)}" is there twice')
    return out


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _NotARecord(f"an integer of {len(text)} digits; at most {MAX_DIGITS} can be read")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _NotARecord(f"the number {text[:40]} is beyond a double's range")
    return value


def _constant(text: str) -> Any:
    raise _NotARecord(f"{text} is no JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_int, parse_float=_float, parse_constant=_constant)
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


def _record(line: int, text: str) -> Record:
    try:
        return _checked(line, text, parse_json(text))
    except ValueError as error:
        return Record(line, text, None, str(error))


def _checked(line: int, text: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(line, text, value)
    kind = "null" if value is None else type(value).__name__
    return Record(line, text, None, f"a record must be a JSON object, this is of type {kind}")


def _lines(file: IO[bytes]) -> Iterator[Record]:
    number = 0
    while raw := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(raw) > MAX_RECORD_BYTES:
            while raw and not raw.endswith(b"\n"):
                start, raw = raw[:200], file.readline(2**20)
            yield Record(number, repr(start), None, f"longer than {MAX_RECORD_BYTES} bytes")
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        try:
            text = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            utf16 = " (the file looks like UTF-16: save it as UTF-8)" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            reason = f"not UTF-8: {error.reason} at byte {error.start}{utf16}"
            yield Record(number, raw.decode("utf-8", "backslashreplace"), None, reason)
            continue
        yield _record(number, text)


def _json(raw: bytes) -> Iterator[Record]:
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        reason = f"not UTF-8: {error.reason} at byte {error.start} of the file; nothing of it can be read"
        yield Record(line, raw[max(0, error.start - 100) :][:200].decode("utf-8", "backslashreplace"), None, reason)
        return
    start = _skip(text, 0)
    if start == len(text):
        return
    if text[start] == "[":
        yield from _array(text, start + 1)
        return
    try:
        _LENIENT.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one record a line, whatever the name says
            yield from (_record(n, part) for n, part in enumerate(text.split("\n"), 1) if part.strip())
            return
    except (ValueError, RecursionError):
        pass  # the strict reader says what is wrong
    yield _record(text.count("\n", 0, start) + 1, text[start:])


def _array(text: str, at: int) -> Iterator[Record]:
    """The elements of an array. Where the text is no JSON, the rest of it is one unreadable record."""
    line, counted = 1, 0
    while (at := _skip(text, at)) < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            _, end = _LENIENT.raw_decode(text, at)
            after = _skip(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
        except (ValueError, RecursionError) as error:
            why = (
                f"{error.msg} at line {error.lineno}"
                if isinstance(error, json.JSONDecodeError)
                else "nested too deeply"
            )
            rest = f"not JSON: {why}; the {len(text) - at} characters from here to the end of the file are unread"
            yield Record(line, text[at:], None, rest)
            return
        yield _record(line, text[at:end])
        at = after + (text[after] == ",")
    if at >= len(text):
        yield Record(line, "", None, "not JSON: the array is not closed; the file may be cut off")
    elif (left := _skip(text, at + 1)) < len(text):
        line += text.count("\n", counted, left)
        yield Record(line, text[left:], None, f"not JSON: {len(text) - left} characters after the end of the array")


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _parquet(path: Path) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            if b"tutelage.schema_version" in (file.schema_arrow.metadata or {}):
                raise DataError(
                    f"{path} is a shard of a trajectory store, which holds accepted and rejected trajectories with "
                    "their tokens. Read its folder as a trajectory store, or export demonstrations from it."
                )
            row = 0
            for batch in file.iter_batches(batch_size=64):
                for i in range(batch.num_rows):
                    row += 1
                    try:
                        (value,) = batch.slice(i, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        yield Record(row, "", None, f"not UTF-8: {error.reason}")
                        continue
                    value = _plain(value)
                    yield Record(row, json.dumps(value), value)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _plain(value: Any) -> Any:
    """Arrow's values as JSON has them; dates, decimals and bytes as text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
