"""The run's folder: settings, logs, checkpoints, trajectories, result. All of it readable without this library.

config.yaml       the resolved settings, versions and seed
metrics.jsonl     one line per optimiser step; every name carries its unit
events.jsonl      rounds, verdicts, stage changes, each with its reason
trajectories/     every round's draw: kept, rejected and errors alike
checkpoints/      resumable states, at most `keep`
model/            final weights and tokenizer, as transformers loads them
result.json       before and after, with intervals
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """The whole text or the old file, whatever happens."""
    work = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(work, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(work, path)
    except OSError:
        work.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class JsonLines:
    """An append-only log that can be cut back to where a checkpoint was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab")  # noqa: SIM115  kept open for the run
        self.num_bytes = self._file.tell()

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, allow_nan=True, separators=(",", ":"), default=_plain).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self.num_bytes += len(line)

    def cut(self, num_bytes: int) -> None:
        """Drop everything after `num_bytes`: what was logged after the checkpoint will be logged again."""
        if num_bytes > self.num_bytes:
            raise DataError(
                f"{self.path} has {self.num_bytes} bytes but the checkpoint was made at {num_bytes}: the log was cut "
                "from outside. Resume from another checkpoint, or restore the file."
            )
        self._file.truncate(num_bytes)
        self._file.seek(num_bytes)
        self.num_bytes = num_bytes

    def flush_to_disk(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


class RunDirectory:
    """Opens or creates the folder of a run.

    Args:
        is_writer: False in all but the first process: they read, and write nothing.
    """

    def __init__(self, root: Path, *, is_writer: bool = True) -> None:
        self.root = root
        self.is_writer = is_writer
        for name in ("trajectories", "checkpoints", "work"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.metrics = JsonLines(root / "metrics.jsonl") if is_writer else None
        self.events = JsonLines(root / "events.jsonl") if is_writer else None

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def trajectories(self) -> Path:
        return self.root / "trajectories"

    def work(self, stage: int, round_index: int) -> Path:
        """Chunks of a round that is being drawn."""
        return self.root / "work" / f"stage{stage}-round{round_index}"

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(record)

    def log_event(self, event: str, fields: Mapping[str, Any]) -> None:
        if self.events:
            self.events.write({"event": event, **fields, "time_unix_s": round(time.time(), 3)})

    def log_sizes(self) -> dict[str, int]:
        """Bytes in each log, for a checkpoint."""
        out = {}
        for name, log in (("metrics", self.metrics), ("events", self.events)):
            if log:
                log.flush_to_disk()
                out[name] = log.num_bytes
        return out

    def cut_logs(self, sizes: Mapping[str, int]) -> None:
        if self.metrics and self.events:
            self.metrics.cut(sizes.get("metrics", 0))
            self.events.cut(sizes.get("events", 0))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        if self.is_writer:
            write_atomically(self.root / name, json.dumps(value, indent=2, default=_plain) + "\n")

    def close(self) -> None:
        for log in (self.metrics, self.events):
            if log:
                log.close()
