"""The trajectory store: a folder of Parquet shards, each there whole or not at all, and a manifest that names them.

`manifest.json` is the truth: a Parquet file it does not name was never committed (or came from elsewhere) and is
reported, not read. Any Parquet reader can read the shards as they are.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.data.files import atomic_file, check_exists, remove_stale, sha256_of, sync_folder, write_json
from tutelage.data.rows import SCHEMA, SCHEMA_VERSION, STORED, decode, encode, to_row
from tutelage.data.secrets import SecretPolicy, guard
from tutelage.errors import ConfigError, DataError
from tutelage.types import Trajectory

MANIFEST = "manifest.json"
FORMAT = "tutelage-trajectories"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One committed file of the store."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(slots=True, kw_only=True)
class Manifest:
    """Which shards a store has, in order."""

    shards: list[Shard] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever the writer wanted to keep about the store as a whole (JSON values)."""
    compacted: list[str] = field(default_factory=list)
    """Journals whose trajectories are in the shards; a journal of such a name is a leftover."""

    @property
    def num_rows(self) -> int:
        return sum(s.rows for s in self.shards)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read `manifest.json`.

        Raises:
            DataError: it is not readable, or was written by a later version of the schema.
        """
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
            version = raw["schema_version"]
            if raw["format"] == FORMAT and version <= SCHEMA_VERSION:
                return cls(
                    shards=[Shard(**s) for s in raw["shards"]], metadata=raw["metadata"], compacted=raw["compacted"]
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} must be the manifest of a trajectory store, and cannot be read: {error!r}. "
                "The shards beside it are Parquet files and can still be read one by one."
            ) from error
        raise DataError(
            f"{path} has format {raw['format']!r} and schema version {version}; this version of tutelage reads "
            f"{FORMAT!r} up to schema version {SCHEMA_VERSION}. Install a later version."
        )

    def save(self, folder: Path) -> None:
        raw = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "num_rows": self.num_rows,
            "shards": [asdict(s) for s in self.shards],
            "metadata": self.metadata,
            "compacted": self.compacted,
        }
        write_json(folder / MANIFEST, raw, kept=f"The {len(self.shards)} shards and the manifest before it are intact.")


class ShardFile:
    """A Parquet shard being written: rows are encoded as they come and leave memory in row groups."""

    def __init__(self, file: IO[bytes], *, rows_per_group: int = 512, tokens_per_group: int = 1_000_000) -> None:
        self._file, self._rows_per_group, self._tokens_per_group = file, rows_per_group, tokens_per_group
        self._writer = pq.ParquetWriter(file, SCHEMA, compression="zstd", write_page_checksum=True)
        self._pending: list[pa.RecordBatch] = []
        self._pending_tokens = 0
        self.rows = 0

    def add(self, encoded: pa.RecordBatch, num_tokens: int) -> None:
        self._pending.append(encoded)
        self._pending_tokens += num_tokens
        self.rows += 1
        if len(self._pending) >= self._rows_per_group or self._pending_tokens >= self._tokens_per_group:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending).combine_chunks())
            self._pending, self._pending_tokens = [], 0


def write_shard(path: Path, trajectories: Iterable[Trajectory], *, kept: str) -> Shard:
    """Write one whole shard from a stream; nothing is looked for or changed in the text.

    Raises:
        DataError: a trajectory holds what cannot be stored. DiskError: the disk. In both cases there is no new file.
    """
    with atomic_file(path, kept=kept) as file:
        shard = ShardFile(file)
        for t in trajectories:
            shard.add(encode(to_row(t)), t.num_tokens)
        shard.finish()
    return Shard(name=path.name, rows=shard.rows, bytes=path.stat().st_size, sha256=sha256_of(path))


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """One holder of a lock file at a time in a folder, where the system can lock files.

    Raises:
        DataError: another writer holds the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows: the manifest is still replaced whole
        yield
        return
    with open(folder / name, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{folder} is being written by another writer, which holds {folder / name}. "
                "Wait for it, or write to another folder."
            ) from error
        yield


class TrajectoryWriter:
    """Appends trajectories to a store, which it creates if it is not there. Use as a context manager.

    A shard is committed (renamed, then named by the manifest) when it has `rows_per_shard` rows and on `close`, which
    also runs when the block raises: what was written before is kept. A killed process loses at most the rows of the
    shard it was writing; where not one may be lost, write to a `Journal`.

    Memory: at most 512 rows or a million tokens (whichever comes first) are held, about 22 bytes a token.

    Raises:
        DataError: another writer holds the folder; a trajectory holds what cannot be stored (it is not written, the
            writer goes on). DiskError: the disk is full or failed; shards committed before are intact.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rows_per_shard: int = 4096,
        metadata: Mapping[str, Any] | None = None,
        secrets: SecretPolicy = "flag",
    ) -> None:
        if rows_per_shard < 1:
            raise ConfigError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
        self.path, self.num_rows = Path(path), 0
        self._rows_per_shard, self._secrets = rows_per_shard, secrets
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            remove_stale(self.path, force=True)
            self._manifest = Manifest.load(self.path) if (self.path / MANIFEST).exists() else Manifest()
            self._manifest.metadata.update(metadata or {})
            self._lock = stack.pop_all()
        self._open_shard: ExitStack | None = None
        self._shard: ShardFile | None = None
        self._shard_path = self.path
        self._is_closed = False

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._is_closed and error is not None:
            return
        self.close()

    def write(self, trajectory: Trajectory) -> None:
        """Append one trajectory."""
        if self._is_closed:
            raise DataError(f"the writer of {self.path} is closed; open another to append more")
        trajectory = guard(trajectory, self._secrets)
        encoded = encode(to_row(trajectory))
        try:
            shard = self._shard or self._begin_shard()
            shard.add(encoded, trajectory.num_tokens)
            self.num_rows += 1
            if shard.rows >= self._rows_per_shard:
                self._end_shard()
        except BaseException as error:
            self._abandon(error)
            raise

    def write_all(self, trajectories: Iterable[Trajectory]) -> None:
        """Append a stream of trajectories."""
        for trajectory in trajectories:
            self.write(trajectory)

    def close(self) -> None:
        """Commit what is left, and the manifest. Closing twice does nothing."""
        if self._is_closed:
            return
        try:
            if self._shard is not None:
                self._end_shard()
            else:
                self._manifest.save(self.path)  # an empty store, or new metadata
        except BaseException as error:
            self._abandon(error)
            raise
        self._is_closed = True
        self._lock.close()

    def _kept(self) -> str:
        return f"The {len(self._manifest.shards)} shards before it ({self._manifest.num_rows} trajectories) are intact."

    def _begin_shard(self) -> ShardFile:
        number = len(self._manifest.shards)
        while (path := self.path / f"shard-{number:06d}.parquet").exists():
            number += 1
        self._open_shard = ExitStack()
        file = self._open_shard.enter_context(atomic_file(path, kept=self._kept()))
        self._shard_path, self._shard = path, ShardFile(file)
        return self._shard

    def _end_shard(self) -> None:
        assert self._shard is not None and self._open_shard is not None
        self._shard.finish()
        self._open_shard.close()
        path, rows = self._shard_path, self._shard.rows
        self._shard = self._open_shard = None
        self._manifest.shards.append(
            Shard(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=sha256_of(path))
        )
        self._manifest.save(self.path)

    def _abandon(self, error: BaseException) -> None:
        """Give up the shard being written, remove its temporary file, and unlock."""
        self._is_closed = True
        try:
            if self._open_shard is not None:
                self._open_shard.__exit__(type(error), error, error.__traceback__)
        finally:
            self._lock.close()


def remove_store(folder: Path) -> None:
    """Delete a store's manifest, then its shards, if there is one; what else the folder holds stays.

    Raises:
        DataError: another writer holds the folder.
    """
    if not (folder / MANIFEST).exists():
        return
    with locked(folder):
        names = [s.name for s in Manifest.load(folder).shards]
        (folder / MANIFEST).unlink()
        for name in names:
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)


class TrajectoryStore:
    """Reads a store. Streams: at most one batch of rows is in memory.

    Args:
        path: the folder that holds `manifest.json`.

    Raises:
        DataError: there is no such folder or manifest; the message names what is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_exists(self.path, "a trajectory store")
        if not (self.path / MANIFEST).exists():
            files = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
            raise DataError(
                f"{self.path} has no {MANIFEST}, so it is not a trajectory store; it holds "
                f"{', '.join(files[:5]) or 'nothing'}. A round that was interrupted has none until it is finished."
            )
        self._manifest = Manifest.load(self.path)
        self.problems: list[str] = []
        """What reading with `on_bad_shard="skip"` could not read, by shard name."""

    def __len__(self) -> int:
        """Trajectories in the store, by its manifest."""
        return self._manifest.num_rows

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self._manifest.shards)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._manifest.metadata

    def scan(
        self,
        columns: Sequence[str],
        *,
        batch_rows: int = 1024,
        on_bad_shard: Literal["error", "skip"] = "error",
    ) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows, in order, as Arrow batches; the columns are those of `rows.SCHEMA`.

        Raises:
            DataError: a column is unknown. A shard is missing or damaged, and `on_bad_shard` is "error"; with "skip" it
                is left out from where the damage is, and named in `problems`.
        """
        unknown = sorted(set(columns) - set(SCHEMA.names))
        if unknown:
            raise DataError(f"{self.path} has no column {', '.join(unknown)}; it has {', '.join(SCHEMA.names)}")
        for shard in self._manifest.shards:
            try:
                yield from self._scan_shard(shard, columns, batch_rows)
            except DataError as error:
                if on_bad_shard == "error":
                    raise
                self.problems.append(str(error))

    def read(
        self,
        *,
        where: Callable[[int], bool] | None = None,
        batch_rows: int = 256,
        on_bad_shard: Literal["error", "skip"] = "error",
    ) -> Iterator[Trajectory]:
        """All trajectories, or those whose row number (over the whole store) `where` accepts, in order.

        Each shard is compared with its SHA-256 before anything of it is given.

        Raises:
            DataError: as for `scan`.
        """
        row = 0
        for shard in self._manifest.shards:
            first = row
            try:
                for batch in self._scan_shard(shard, STORED, batch_rows, is_hashed=True):
                    numbers = [i for i in range(batch.num_rows) if where is None or where(row + i)]
                    row += batch.num_rows
                    yield from decode(batch if len(numbers) == batch.num_rows else batch.take(pa.array(numbers, "i8")))
            except DataError as error:
                if on_bad_shard == "error":
                    raise
                self.problems.append(str(error))
            row = first + shard.rows

    def __iter__(self) -> Iterator[Trajectory]:
        return self.read()

    def verify(self) -> list[str]:
        """Check every shard against the manifest, byte for byte and row by row. Empty when all is well."""
        found = []
        for shard in self._manifest.shards:
            try:
                rows = sum(len(decode(b)) for b in self._scan_shard(shard, STORED, 256, is_hashed=True))
                if rows != shard.rows:
                    raise DataError(f"shard {self.path / shard.name} has {rows} rows, the manifest says {shard.rows}")
            except DataError as error:
                found.append(str(error))
        return found + [
            f"{self.path / name}: not named by the manifest, so not read: it was never committed, or was put here"
            for name in self._unnamed()
        ]

    def _unnamed(self) -> list[str]:
        named = {s.name for s in self._manifest.shards}
        return sorted(p.name for p in self.path.glob("*.parquet") if p.name not in named)

    def _scan_shard(
        self, shard: Shard, columns: Sequence[str], batch_rows: int, *, is_hashed: bool = False
    ) -> Iterator[pa.RecordBatch]:
        path = self.path / shard.name
        others = "The other shards can be read: on_bad_shard='skip' leaves this one out."
        if not path.exists():
            raise DataError(f"shard {path} ({shard.rows} trajectories) is named by the manifest and missing. {others}")
        if path.stat().st_size != shard.bytes:
            raise DataError(
                f"shard {path} is damaged: {path.stat().st_size} bytes, the manifest says {shard.bytes}. {others}"
            )
        if is_hashed and (actual := sha256_of(path)) != shard.sha256:
            raise DataError(
                f"shard {path} is damaged: its SHA-256 is {actual}, the manifest says {shard.sha256}. {others}"
            )
        try:
            yield from iter_shard(path, columns, batch_rows)
        except DataError as error:
            raise DataError(f"{error} {others}") from error


def iter_shard(path: Path, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns of one shard, by its pages' own checksums.

    Raises:
        DataError: it is damaged, or is no shard of a store.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise DataError(f"shard {path} is damaged or no shard: its columns are not those of a trajectory.")
            for batch in file.iter_batches(batch_size=batch_rows, columns=list(columns)):
                yield batch.select(list(columns))
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"shard {path} is damaged: {error}.") from error
