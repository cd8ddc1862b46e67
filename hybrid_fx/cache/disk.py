"""Plans, and why there is none, on the disk: one JSON file a key, in a directory of one user.

A file counts only if it is a regular file of this user that nobody else may write, carries the
digest it is asked for and a matching checksum, and its sources pass the grammar. Anything else is
one warning and a miss. Writing goes through a temporary file, fsync and rename, so that a reader
sees a whole file or none, whatever dies in between and however many processes write.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CacheError
from ..plan.failure import Failure
from ..plan.plan import Plan
from ..plan.source_check import check_source
from .private_files import check_owner, make_private, read_own_file, replace_file

FORMAT = 1
"""Version of the file's envelope."""
STALE_SECONDS = 3600
"""Age at which the temporary file of a writer that died is swept away."""

_T = TypeVar("_T")

_DIGEST = re.compile(r"[0-9a-f]{8,128}")
_ENTRY = re.compile(r"[0-9a-f]{8,128}\.json")
_TEMPORARY = re.compile(r"\.(products-\w+-)?[0-9a-f]{8,128}\.[^/]*\.tmp")


def default_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/hybrid_fx`` or ``~/.cache/hybrid_fx``.

    Raises:
        CacheError: when the user has no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative value is to be ignored, says the XDG base directory specification.
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError as error:
        raise CacheError(f"no directory for plans ({error}); set cache_dir or HOME") from None
    return base / "hybrid_fx"


def check_digest(digest: str) -> str:
    """Return ``digest`` if it can be the name of a file.

    Raises:
        CacheError: for anything but 8 to 128 lower-case hexadecimal digits.
    """
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise CacheError(f"key digest {digest!r:.80} must be 8 to 128 lower-case hex digits")
    return digest


class DiskStore:
    """The plans under one directory. The constructor touches nothing.

    No method raises for what it finds on the disk: the first trouble with the directory, and each
    bad file, is one ``RuntimeWarning``, and the caller goes on without.

    Args:
        directory: created at the first write with mode 0700, missing parents too.
        operator_names: what the sources of a plan may call; a plan that calls more is a miss.
        limit: files to keep; the ones unused for longest go first, when a new one is written.
    """

    def __init__(
        self, directory: Path, *, operator_names: Collection[str], limit: int = 256
    ) -> None:
        self.directory = Path(directory)
        self.limit = limit
        self._operator_names = frozenset(operator_names)
        self._warned = False

    def path(self, digest: str) -> Path:
        """Return the file of ``digest``."""
        return self.directory / f"{check_digest(digest)}.json"

    def read(self, digest: str) -> Plan | None:
        """Return the plan stored for ``digest``, or None."""
        return self._read(digest, "plan", self._plan)

    def read_failure(self, digest: str) -> Failure | None:
        """Return the failure stored for ``digest``, or None."""
        return self._read(digest, "failure", Failure.from_json)

    def _read(self, digest: str, kind: str, make: Callable[[Any], _T]) -> _T | None:
        path = self.path(digest)
        try:
            check_owner(os.stat(self.directory), self.directory, "directory")
        except FileNotFoundError:
            return None
        except (CacheError, OSError) as error:
            self._trouble("read", error)
            return None
        try:
            return make(_decode(read_own_file(path), digest, kind))
        except FileNotFoundError:
            return None
        except (CacheError, OSError, RecursionError) as error:
            warnings.warn(
                f"hybrid_fx: the stored {kind} {path} is not used ({error}); the model is captured "
                "again and the file replaced",
                RuntimeWarning,
                stacklevel=4,
            )
            return None

    def write(self, digest: str, plan: Plan) -> bool:
        """Store ``plan`` under ``digest``; return whether that went well."""
        return self._write(digest, "plan", plan.to_json())

    def write_failure(self, digest: str, failure: Failure) -> bool:
        """Store ``failure`` under ``digest``; return whether that went well."""
        return self._write(digest, "failure", failure.to_json())

    def _write(self, digest: str, kind: str, value: Any) -> bool:
        path = self.path(digest)
        content = _encode(digest, kind, value)
        try:
            make_private(self.directory)
            check_owner(os.stat(self.directory), self.directory, "directory")
            replace_file(path, content)
        except (CacheError, OSError) as error:
            self._trouble("written", error)
            return False
        self._prune(path.name)
        return True

    def _trouble(self, verb: str, error: Exception) -> None:
        """Warn, once in the life of this store: the next call would say the same."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"hybrid_fx: plans under {self.directory} cannot be {verb} ({error}); going on "
                "without. Set cache_dir to a directory of your own, or disk_cache=False",
                RuntimeWarning,
                stacklevel=5,
            )

    def _plan(self, value: Any) -> Plan:
        plan = Plan.from_json(value)
        for source in plan.sources.values():
            check_source(source, self._operator_names)
        return plan

    def _prune(self, newest: str) -> None:
        """Remove what was unused for longest, and what dead writers left. Best effort."""
        aged: list[tuple[int, str]] = []
        stale = time.time() - STALE_SECONDS
        with contextlib.suppress(OSError), os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    used = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(used.st_mode):
                        continue
                    if _ENTRY.fullmatch(entry.name) and entry.name != newest:
                        aged.append((used.st_mtime_ns, entry.path))
                    elif _TEMPORARY.fullmatch(entry.name) and used.st_mtime < stale:
                        os.unlink(entry.path)
        keep = max(self.limit - 1, 0)
        for _, path in sorted(aged)[: max(len(aged) - keep, 0)]:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _encode(digest: str, kind: str, value: Any) -> bytes:
    envelope = {"format": FORMAT, "key": digest, "sha256": _checksum(digest, value), kind: value}
    return (json.dumps(envelope, indent=1, allow_nan=False) + "\n").encode("ascii")


def _decode(content: bytes, digest: str, kind: str) -> Any:
    """What :func:`_encode` wrote of this key and kind."""
    try:
        value = json.loads(content.decode("ascii"), object_pairs_hook=_unique)
    except ValueError as error:
        raise CacheError(f"damaged: {error}") from None
    if type(value) is not dict or set(value) != {"format", "key", "sha256", kind}:
        raise CacheError(f"damaged: not the fields of a stored {kind}")
    if value["format"] != FORMAT:
        raise CacheError(f"its format is {value['format']!r:.40}, this version reads {FORMAT}")
    if value["key"] != digest:
        raise CacheError(f"it belongs to another key, {value['key']!r:.80}")
    if value["sha256"] != _checksum(digest, value[kind]):
        raise CacheError("damaged: the checksum does not match")
    return value[kind]


def _checksum(digest: str, value: Any) -> str:
    """SHA-256 of everything else in the file, in one fixed spelling."""
    spelled = json.dumps([FORMAT, digest, value], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(spelled.encode("ascii")).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise CacheError("damaged: an object names one field twice")
    return value
