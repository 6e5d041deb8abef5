"""Trajectories kept one by one, for writers that must not lose a single one; compacted into a store later.

`journal.jsonl` lies beside the shards of a store. Each trajectory is one line, on disk before `append` returns. To
compact, the journal is renamed, its trajectories become shards, one replacement of the manifest names both the shards
and the journal they came from, and the journal is deleted: a kill at any instant neither loses nor doubles anything.
"""

import json
import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType

from tutelage.data.files import disk_error, sync_folder
from tutelage.data.quarantine import Quarantine
from tutelage.data.rows import encode, from_row, to_row
from tutelage.data.secrets import SecretPolicy, guard
from tutelage.data.store import MANIFEST, Manifest, Shard, locked, write_shard
from tutelage.errors import DataError
from tutelage.types import Trajectory

NAME = "journal.jsonl"
_TURNED = re.compile(r"journal-(\d{6,})\.jsonl")


class Journal:
    """Append-only JSONL of trajectories beside a store. Use as a context manager.

    A last line that a dead writer left torn is moved to the quarantine when the journal is opened, unless it is whole
    but for its end.

    Args:
        folder: the store's folder; made if it is not there.
        is_synced: wait for the disk with every line. Without it a crash of the machine (not of the process) may lose
            the last lines.
        quarantine: where lines go that cannot be read; by default `quarantine.jsonl` in the folder, whole.
        secrets: what is done about credentials in the text (`secrets.guard`).

    Raises:
        DataError: another journal writer holds the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        is_synced: bool = True,
        quarantine: Quarantine | None = None,
        secrets: SecretPolicy = "flag",
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._is_synced, self._secrets = is_synced, secrets
        self._quarantine = quarantine or Quarantine(self.folder / "quarantine.jsonl", raw_chars=None)
        with ExitStack() as stack:
            stack.enter_context(locked(self.folder, ".journal.lock"))
            self._mend()
            self._handle: int | None = None
            self._open()
            self._lock = stack.pop_all()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The journal being written."""
        return self.folder / NAME

    def append(self, trajectory: Trajectory) -> None:
        """Keep one trajectory; it is on disk when this returns.

        Raises:
            DataError: it holds what cannot be stored, or the journal is closed. DiskError: the disk is full or failed;
                the journal is as it was before.
        """
        if self._handle is None:
            raise DataError(f"the journal {self.path} is closed; open another to append more")
        row = to_row(guard(trajectory, self._secrets))
        encode(row)  # what goes in can be compacted
        line = json.dumps(row).encode() + b"\n"
        size = os.fstat(self._handle).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._handle, line[written:])
            if self._is_synced:
                os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, size)
            kept = f"Everything appended before trajectory {trajectory.id} is intact."
            raise disk_error(error, self.path, kept=kept) from error

    def read(self) -> Iterator[Trajectory]:
        """What has been appended and not been compacted, in order. Unreadable lines go to the quarantine."""
        for path in [*self._turned(), self.path]:
            yield from self._read(path)

    def compact(self, *, rows_per_shard: int = 4096) -> int:
        """Move everything into the store's shards; returns how many trajectories.

        Raises:
            DataError: another writer holds the store, or the journal is closed. DiskError: the disk. The trajectories
                are then still in the journal, and the next `compact` starts again.
        """
        if self._handle is None:
            raise DataError(f"the journal {self.path} is closed; open another to compact it")
        with locked(self.folder):
            os.close(self._handle)
            self._handle = None
            try:
                if self.path.stat().st_size:
                    self.path.rename(self.folder / f"journal-{self._next_number():06d}.jsonl")
                    sync_folder(self.folder)
                moved = sum(self._compact(path, rows_per_shard) for path in self._turned())
            finally:
                self._open()
        return moved

    def close(self) -> None:
        """Close the file. What was appended stays in the journal until it is compacted."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            self._lock.close()

    def _open(self) -> None:
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def _manifest(self) -> Manifest:
        return Manifest.load(self.folder) if (self.folder / MANIFEST).exists() else Manifest()

    def _turned(self) -> list[Path]:
        """Journals that wait to be compacted; those whose shards the manifest names are deleted."""
        done, waiting = set(self._manifest().compacted), []
        for path in sorted(p for p in self.folder.iterdir() if _TURNED.fullmatch(p.name)):
            if path.name in done:
                path.unlink()
            else:
                waiting.append(path)
        return waiting

    def _next_number(self) -> int:
        names = [*self._manifest().compacted, *(p.name for p in self.folder.iterdir())]
        return 1 + max((int(m[1]) for m in map(_TURNED.fullmatch, names) if m), default=-1)

    def _compact(self, path: Path, rows_per_shard: int) -> int:
        manifest, stream = self._manifest(), self._read(path)
        shards: list[Shard] = []
        while chunk := list(islice(stream, rows_per_shard)):
            target = self.folder / f"{path.stem}-{len(shards):03d}.parquet"
            shards.append(write_shard(target, chunk, kept=f"The trajectories are still in {path.name}."))
        manifest.shards += shards
        manifest.compacted.append(path.name)
        manifest.save(self.folder)
        path.unlink()
        return sum(s.rows for s in shards)

    def _read(self, path: Path) -> Iterator[Trajectory]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield from_row(json.loads(line))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    self._quarantine.add(file=path.name, line=number, reason=f"not a trajectory: {error}", raw=line)

    def _mend(self) -> None:
        """Give a whole last line its end; move a torn one to the quarantine."""
        if not self.path.exists():
            return
        with open(self.path, "r+b") as file:
            content = _tail(self.path)
            if not content:
                return
            try:
                from_row(json.loads(content))
            except (ValueError, KeyError, TypeError, RecursionError):
                with open(self.path, "rb") as whole:
                    number = 1 + sum(1 for line in whole if line.endswith(b"\n"))
                self._quarantine.add(file=NAME, line=number, reason="torn: its writer died within it", raw=content)
                file.truncate(self.path.stat().st_size - len(content))
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())


def _tail(path: Path) -> bytes:
    """What follows the last line end; empty where the file ends with one."""
    with open(path, "rb") as file:
        last = b"".join(deque(file, maxlen=1))
    return b"" if last.endswith(b"\n") else last
