"""Files that a crash, a full disk or another process cannot damage; opening regular files only."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

MOST_REASON = 300
PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows


_held: set[int] = set()
"""Open lock files of this process."""


class NotWritten(OSError):
    """A file could not be written, and what it held before is unchanged; the message names it."""


class InUse(ValueError):
    """Another process holds the lock of a file; the message names its process ID."""


@contextmanager
def replacing(path: Path, mode: str = "wb", **options) -> Iterator[IO]:
    """Open a file that replaces `path` once it is complete and on disk.

    It is written under a new random name in the same folder. If anything fails it is removed, and
    `path` stays as it was. NotWritten says why, such as a full disk. A device or pipe is written
    directly.
    """
    if path.exists() and not path.is_file():
        with open(path, mode, **options) as file:
            yield file
        return
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666)
        try:
            with open(new, mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise NotWritten(f"{path}: not written: {error.strerror or error}") from None
    with suppress(OSError):  # not all file systems can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def remove_parts(folder: Path) -> None:
    """Remove what `replacing` left in `folder` when its process was killed."""
    for part in folder.glob(".*.part"):
        if PART.fullmatch(part.name):
            part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Context in which no other process holds the lock file `path`, which stays afterwards.

    The operating system releases the lock when the process ends, however it ends. The file holds
    the process ID of the last owner. Without `fcntl`, or on a file system without locks, there is
    no lock.

    Args:
        path: the lock file, created if missing; a symbolic link is refused.
        wait: wait for the other process; False raises InUse.

    Raises:
        InUse: another process holds the lock, and `wait` is False.
        NotWritten: the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
    except OSError as error:
        raise NotWritten(f"{path}: not written: {error.strerror}") from None
    _held.add(handle)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                owner = os.read(handle, 20).decode("ascii", "replace").strip() or "unknown"
                raise InUse(f"in use by process {owner}") from None
            except OSError:
                pass  # a file system without locks
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        if handle in _held:  # not in a child process, which has closed it
            _held.remove(handle)
            os.close(handle)


def _close_in_child() -> None:
    """Close the locks that a forked process inherits, such as a worker that outlives its parent."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a regular file for reading in binary.

    Raises:
        OSError: the file cannot be opened, or is a folder, a pipe or a device, which could block
            the caller or have no end; the message does not name it.
    """
    # O_NONBLOCK: opening a pipe does not wait for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("expected a regular file, got a folder, pipe or device")
    with open(handle, "rb") as file:
        yield file


def reason(error: BaseException) -> str:
    """An error's message in one line of at most MOST_REASON characters, without a path; its class
    if it has none.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return lines[0][:MOST_REASON] if lines else type(error).__name__
