"""Where records go that cannot be used: nothing is dropped without its file, line and reason."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

from tutelage.data.files import disk_error

RAW_CHARS = 2000
"""How much of a record is kept beside its reason, unless a quarantine is told otherwise."""


class Quarantine:
    """A JSONL file of `{file, line, reason, raw}`, one line per record, written as they come.

    The file is made with the first record. The same record is kept once, also when a resumed run reads it again.

    Args:
        path: the file; None only counts.
        raw_chars: how much of a record is kept; None keeps all of it.
    """

    def __init__(self, path: str | Path | None = None, *, raw_chars: int | None = RAW_CHARS) -> None:
        self.path = None if path is None else Path(path)
        self._raw_chars = raw_chars
        self.count = 0
        """Records given to this object."""
        self.reasons: Counter[str] = Counter()
        """How many records per reason."""
        self.first: list[str] = []
        """The first five, as `file:line: reason`."""
        self._written: set[bytes] | None = None

    def add(self, *, file: str, line: int | None, reason: str, raw: str | bytes = "") -> None:
        """Keep one record.

        Raises:
            DiskError: the file cannot be written.
        """
        text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
        limit = self._raw_chars
        kept = text if limit is None or len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
        self.count += 1
        self.reasons[reason] += 1
        if len(self.first) < 5:
            self.first.append(f"{file}:{line}: {reason}" if line is not None else f"{file}: {reason}")
        if self.path is None:
            return
        entry = json.dumps({"file": file, "line": line, "reason": reason, "raw": kept}).encode() + b"\n"
        try:
            self._append(self.path, entry)
        except OSError as error:
            raise disk_error(error, self.path, kept=f"It would have kept {file}:{line}: {reason}.") from error

    def _append(self, path: Path, entry: bytes) -> None:
        if self._written is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            existing = path.read_bytes() if path.exists() else b""
            if existing and not existing.endswith(b"\n"):  # the last writer died within a line
                existing = existing[: existing.rfind(b"\n") + 1]
                os.truncate(path, len(existing))
            self._written = {_digest(e) for e in existing.splitlines(keepends=True)}
        digest = _digest(entry)
        if digest not in self._written:
            with open(path, "ab") as file:
                file.write(entry)
            self._written.add(digest)


def _digest(entry: bytes) -> bytes:
    return hashlib.blake2b(entry, digest_size=8).digest()
