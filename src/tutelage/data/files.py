"""Files that are there whole or not at all: a temporary name, flushed, renamed, and the folder flushed too."""

import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

from tutelage.errors import DataError

TEMPORARY = ".tmp"


class DiskError(DataError, OSError):
    """A file could not be written: the disk is full, a quota is reached, or the device failed."""

    exit_code = 1


def disk_error(error: OSError, path: Path, *, kept: str, do: str = "") -> DiskError:
    """What could not be written and why, what is still there, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    why = error.strerror or str(error)
    what = "Free some space or choose another folder, then resume." if full else "Check the folder and its device."
    return DiskError(f"{path} could not be written: {why}. {kept} {do or what}".replace("  ", " "))


@contextmanager
def tensor_file_errors(path: Path) -> Iterator[None]:
    """Within it safetensors fails as other writers do.

    Raises:
        OSError: the system refused; safetensors says so in the text of an error of its own kind.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextmanager
def disk_errors(path: Path, *, kept: str) -> Iterator[None]:
    """Within it what the disk refuses is a `DiskError` that says what is still there."""
    try:
        with tensor_file_errors(path):
            yield
    except OSError as error:
        if isinstance(error, DiskError):
            raise
        raise disk_error(error, path, kept=kept) from error


@contextmanager
def atomic_file(path: Path, *, kept: str) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only when everything in it has reached the disk.

    Raises:
        DiskError: writing, flushing or renaming failed. Nothing of the name `path` has changed; `kept` says so.
    """
    temporary = path.with_name(_temporary_name(path))
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, DiskError):
            raise disk_error(error, path, kept=kept) from error
        raise


def write_json(path: Path, value: Mapping[str, Any], *, kept: str) -> None:
    """Replace a JSON file whole."""
    with atomic_file(path, kept=kept) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Flush the folder itself (or a file), so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file in the folder and every folder, deepest first."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_folder(path)
    sync_folder(folder)


def remove_stale(folder: Path, *, force: bool = False) -> list[str]:
    """Delete what writers that died left behind; with `force` also what might belong to a writer still alive.

    A temporary file names the host and process that writes it. Returns the names deleted.
    """
    removed = []
    for path in sorted(folder.glob(f".*{TEMPORARY}")):
        host, _, pid = path.name.removesuffix(TEMPORARY).rpartition("@")[2].rpartition(":")
        if force or (host == socket.gethostname() and pid.isdigit() and not _is_alive(int(pid))):
            with suppress(FileNotFoundError):
                path.unlink()
                removed.append(path.name)
    return removed


def _temporary_name(path: Path) -> str:
    return f".{path.name}@{socket.gethostname()}:{os.getpid()}{TEMPORARY}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_exists(path: Path, what: str) -> None:
    """Raise a DataError that names the nearest existing files if there is nothing at `path`."""
    if path.exists():
        return
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    wanted = path.relative_to(folder).parts[0] if folder in path.parents else path.name
    near = get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:5]
    found = "it holds " + ", ".join(near) if near else "it is empty"
    raise DataError(
        f"{what} was to be read from {path}, which does not exist. The nearest folder is {folder}; {found}. "
        "Check the path; a relative one starts at the working directory."
    )
