"""Files in a directory that only its user can write: read if nobody else can have written them.

Writing goes through a temporary file, fsync and rename, so that a reader sees a whole file or none,
whatever dies in between and however many processes write.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from ..errors import CacheError

MAX_BYTES = 2**26
"""Largest file that is read; a plan takes 50 KB to 3 MB."""

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def make_private(directory: Path) -> None:
    """Create ``directory``, and each missing parent, for this user alone."""
    if not directory.exists():
        make_private(directory.parent)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)


def check_owner(found: os.stat_result, path: Path, kind: str) -> None:
    """Refuse what another user owns or may write.

    Raises:
        CacheError: naming the owner or the mode, and the remedy.
    """
    if kind == "directory" and not stat.S_ISDIR(found.st_mode):
        raise CacheError(f"{path} is not a directory")
    if hasattr(os, "getuid"):
        if found.st_uid != os.getuid():
            raise CacheError(f"the {kind} {path} belongs to user {found.st_uid}, not {os.getuid()}")
        if found.st_mode & _WRITABLE_BY_OTHERS:
            mode = stat.S_IMODE(found.st_mode)
            raise CacheError(
                f"the {kind} {path} has mode {mode:04o}: others may write it; chmod go-w"
            )


def read_own_file(path: Path) -> bytes:
    """Return the bytes of ``path``, a regular file of this user; never follow a link to it."""
    # O_NONBLOCK: a pipe laid in our way must not hang the open.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CacheError(f"{path} is not a regular file")
        check_owner(found, path, "file")
        if found.st_size > MAX_BYTES:
            raise CacheError(f"it has {found.st_size} bytes, above the limit of {MAX_BYTES}")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES)
        if os.utime in os.supports_fd:
            with contextlib.suppress(OSError):  # a read-only disk cannot note the use
                os.utime(descriptor)
    finally:
        os.close(descriptor)
    return content


def replace_file(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step that survives a crash."""
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp"
    )
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # not every file system can sync a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
