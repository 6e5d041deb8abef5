"""A round's draw on disk, chunk by chunk: after a kill at any instant a chunk is there whole or not at all.

One Parquet file per chunk, written under a temporary name, flushed and renamed. Reading a chunk back gives
trajectories equal to those committed, to the bit of every log-probability, so a resumed run goes on as if never
stopped. Several processes may commit different chunks of one round; which process has which chunk is decided by
index, so no two write the same one.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from tutelage.data.files import remove_stale, sha256_of
from tutelage.data.rows import STORED, decode, to_row
from tutelage.data.secrets import SecretPolicy, guard
from tutelage.data.store import MANIFEST, Manifest, Shard, TrajectoryStore, iter_shard, locked, write_shard
from tutelage.errors import DataError
from tutelage.types import Trajectory

_CHUNK = re.compile(r"chunk-(\d{6,})\.parquet")


class RoundStore:
    """The chunks of one round, in a folder of its own.

    Args:
        path: the round's folder; made if it is not there. Leftovers of writers that died are deleted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_stale(self.path)

    def commit(self, chunk: int, trajectories: Sequence[Trajectory]) -> None:
        """Keep a chunk. It is on disk when this returns. Committing the same chunk again, equal, does nothing.

        Raises:
            DataError: the chunk is there already with other trajectories; a trajectory cannot be stored.
            DiskError: the disk is full or failed. The chunk is then not there, and the others are untouched.
        """
        path = self._path(chunk)
        if path.exists():
            if _rows(self._read(chunk)) != _rows(trajectories):
                raise DataError(
                    f"{path} is already committed with other trajectories; a chunk is drawn once. Two processes drew "
                    "it, or the settings changed under a run: start the run in a new folder."
                )
            return
        write_shard(path, trajectories, kept=f"The {len(self.committed())} chunks committed before it are intact.")

    def load(self, chunk: int) -> list[Trajectory] | None:
        """The trajectories of a chunk, equal to those committed; None if it was not committed.

        Raises:
            DataError: the file is there and damaged.
        """
        return self._read(chunk) if self._path(chunk).exists() else None

    def discard(self, chunk: int) -> None:
        """Forget a chunk, so that it is made again."""
        self._path(chunk).unlink(missing_ok=True)

    def committed(self) -> tuple[int, ...]:
        """Numbers of the chunks that are there, ascending."""
        found = (_CHUNK.fullmatch(p.name) for p in self.path.iterdir())
        return tuple(sorted(int(m[1]) for m in found if m))

    def __iter__(self) -> Iterator[Trajectory]:
        """All committed trajectories, chunk by chunk."""
        for chunk in self.committed():
            yield from self._read(chunk)

    def finalise(self, num_chunks: int) -> TrajectoryStore:
        """Make the folder a trajectory store: check that every chunk is there and write the manifest.

        No trajectory is written again. Doing it twice does nothing.

        Raises:
            DataError: chunks are missing, or there are more than `num_chunks`.
        """
        chunks = self.committed()
        if chunks != tuple(range(num_chunks)):
            missing = sorted(set(range(num_chunks)) - set(chunks))
            surplus = sorted(set(chunks) - set(range(num_chunks)))
            raise DataError(
                f"the round in {self.path} needs chunks 0 to {num_chunks - 1}; missing {missing[:10]}, surplus "
                f"{surplus[:10]}. Draw what is missing, or finalise with the number of chunks that were planned."
            )
        with locked(self.path):
            remove_stale(self.path, force=True)
            if not (self.path / MANIFEST).exists():
                Manifest(shards=[_shard(self._path(chunk)) for chunk in chunks]).save(self.path)
        return TrajectoryStore(self.path)

    @staticmethod
    def publish(
        store: str | Path, name: str, trajectories: Iterable[Trajectory], *, secrets: SecretPolicy = "flag"
    ) -> Shard:
        """Write a round's whole draw as the shard `name` of a store that collects rounds.

        Publishing a name again replaces that shard, so a round that is finished twice by a resumed run is there once.
        Credentials are flagged or masked in this copy only (`secrets.guard`).

        Raises:
            DataError: a trajectory cannot be stored. DiskError: the disk; what the store held before is intact.
        """
        folder = Path(store)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            remove_stale(folder, force=True)
            manifest = Manifest.load(folder) if (folder / MANIFEST).exists() else Manifest()
            kept = f"The store's {len(manifest.shards)} shards ({manifest.num_rows} trajectories) are intact."
            shard = write_shard(folder / f"{name}.parquet", (guard(t, secrets) for t in trajectories), kept=kept)
            names = [s.name for s in manifest.shards]
            if shard.name in names:
                manifest.shards[names.index(shard.name)] = shard
            else:
                manifest.shards.append(shard)
            manifest.save(folder)
        return shard

    def _path(self, chunk: int) -> Path:
        if chunk < 0:
            raise DataError(f"chunks are numbered from 0, got {chunk}")
        return self.path / f"chunk-{chunk:06d}.parquet"

    def _read(self, chunk: int) -> list[Trajectory]:
        path = self._path(chunk)
        try:
            return [t for batch in iter_shard(path, STORED, 1024) for t in decode(batch)]
        except (ValueError, KeyError, TypeError) as error:  # the first: DataError, or JSON that is none
            raise DataError(f"{error} Delete {path} and resume: the chunk is drawn again.") from error


def _shard(path: Path) -> Shard:
    with pq.ParquetFile(path) as file:
        rows = file.metadata.num_rows
    return Shard(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=sha256_of(path))


def _rows(trajectories: Iterable[Trajectory]) -> list[str]:
    """Text that is equal exactly where the trajectories are, nan included."""
    return [json.dumps(to_row(t)) for t in trajectories]
