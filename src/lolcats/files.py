"""Atomic file writes, locks, checksums of files."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from lolcats.errors import LolcatsError

try:
    import fcntl
except ImportError:  # missing on Windows, where two processes cannot share a sweep
    fcntl = None  # type: ignore[assignment]

TAIL = 1 << 16  # bytes of a file's end that are read at a time
LOCK = ".lock"  # in a directory while a command writes to it


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees either the old file or the complete new one."""
    partial = partial_path(path)
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def partial_path(path: Path) -> Path:
    """The temporary file next to ``path``, one for each rank, since several ranks may write the same file."""
    return path.with_name(f"{path.name}.partial{os.environ.get('RANK', '')}")


@contextmanager
def locked(path: Path, wait: bool = True, remove: bool = False) -> Iterator[bool]:
    """Hold the lock file ``path``, which only one process at a time can hold. It is freed if the process is killed.

    wait: wait until the lock is free; otherwise yield at once whether it was acquired.
    remove: remove the file at the end.
    """
    while True:
        with _open_lock(path) as file:
            ours = _lock(file, wait)
            if ours and not _is_at(file, path):  # removed by the process that held it
                continue
            _held.add(file)
            try:
                yield ours
                return
            finally:
                _held.discard(file)
                if ours and remove and _is_at(file, path):
                    path.unlink()


def _open_lock(path: Path) -> IO[str]:
    """Open the lock file, and make its directory, which another process may be about to remove."""
    for _ in range(1000):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a")
        except (FileNotFoundError, FileExistsError) as error:
            last = error
    raise last


_held: set[IO[Any]] = set()


def _release_in_child() -> None:
    """A forked process does not hold the locks of its parent, which it might outlive."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _is_at(file: IO[Any], path: Path) -> bool:
    """Whether ``path`` still is the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def only_writer(directory: Path) -> Iterator[bool]:
    """Hold ``directory`` as the only process that writes to it; yield at once whether no other process does.

    The directory is made if needed, and removed at the end if nothing was written to it.
    """
    directory = directory.absolute()
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    with ExitStack() as stack:
        try:
            ours = stack.enter_context(locked(directory / LOCK, wait=False, remove=True))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            ours = True  # no process can write here, which the caller will find out
        try:
            yield ours
        finally:
            stack.close()
            with suppress(OSError):  # not empty
                for place in made:
                    place.rmdir()


def is_empty(directory: Path) -> bool:
    """Whether ``directory`` holds nothing but the lock of the process that writes to it."""
    return all(path.name == LOCK for path in directory.iterdir())


def check_directory(directory: Path) -> None:
    """
    Raises:
        LolcatsError: ``directory`` cannot be written to, or not be made.
    """
    ancestor = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise LolcatsError(f"Cannot write to {directory}: {ancestor} is not a writable directory.")


def check_file(path: Path, option: str) -> None:
    """For commands that write a file at their end: refuse it before they begin. ``option`` gave its ``path``.

    Raises:
        LolcatsError: a file cannot be written there.
    """
    if path.is_dir():
        raise LolcatsError(f"{option} {path} is a directory: expected a file.")
    if not path.parent.is_dir():
        raise LolcatsError(f"{option} {path}: {path.parent} is not a directory.")
    if not os.access(path.parent, os.W_OK):
        raise LolcatsError(f"{option} {path}: cannot write to {path.parent}.")


def _lock(file: IO[Any], wait: bool = True) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def append_line(path: Path, line: str) -> None:
    """Append a line, dropping an unfinished one left by a killed process. Several processes may append at once."""
    with path.open("ab+") as file:
        _lock(file)
        rest = _last_line(file)
        if rest and _object(rest) is None:
            file.truncate(file.seek(0, os.SEEK_END) - len(rest))
            rest = b""
        file.write((b"\n" if rest else b"") + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _last_line(file: IO[bytes]) -> bytes:
    """What follows the last line break, read from the end: the file may be long."""
    place, rest = file.seek(0, os.SEEK_END), b""
    while place and b"\n" not in rest:
        size = min(place, TAIL)
        place = file.seek(place - size)
        rest = file.read(size) + rest
    return rest.rpartition(b"\n")[2]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file of ours, one per line; an empty list if it does not exist.

    A full disk or a power cut can leave a line unfinished: such lines are left out, and a warning says so.
    """
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()] if path.exists() else []
    found = [_object(line) for line in lines]
    if broken := [number for number, entry in enumerate(found, 1) if entry is None]:
        warn_once(
            f"{path}: left out {len(broken)} unfinished or damaged line(s) ({', '.join(map(str, broken[:5]))}"
            f"{', ...' if broken[5:] else ''}); the other {len(found) - len(broken)} are used."
        )
    return [entry for entry in found if entry is not None]


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None if it holds none, or only a part of one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8
        return None
    return entry if isinstance(entry, dict) else None


@cache
def warn_once(message: str) -> None:
    """Log a warning, the same one only once."""
    logging.getLogger(__name__).warning(message)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256 " + hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yield the path of a directory to create, which replaces ``directory`` if the block ends without an error."""
    unfinished = directory.with_name(directory.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)


def give_usual_mode(*paths: Path) -> None:
    """Give safetensors files the permissions of any new file beside them, which the umask decides.

    The library writes files that only their owner can read.
    """
    for path in paths:
        probe = path.with_name(f".{path.name}.{uuid4().hex}")
        probe.touch()
        try:
            path.chmod(stat.S_IMODE(probe.stat().st_mode))
        finally:
            probe.unlink()
