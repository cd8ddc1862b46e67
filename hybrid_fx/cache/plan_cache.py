"""What one engine knows of structures: their plans, or why there is none; recent ones in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from ..plan.failure import Failure
from ..plan.plan import Plan
from .disk import DiskStore, check_digest

_T = TypeVar("_T")


class PlanCache:
    """Plans and failures by the digest of their structure's key. Each engine owns one.

    Args:
        directory: of the files, e.g. :func:`.disk.default_directory`; None keeps to memory.
        operator_names: what the sources of a stored plan may call (the names of the operator
            table); a stored plan that calls anything else is a miss.
        memory: plans, and failures, to keep in memory; the one unused for longest goes first.
        files: files to keep on the disk.

    Attributes:
        hits_memory, hits_disk, misses: how the calls of :meth:`get` ended, counted.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        operator_names: Collection[str],
        memory: int = 16,
        files: int = 256,
    ) -> None:
        self.hits_memory = 0
        self.hits_disk = 0
        self.misses = 0
        self._memory: OrderedDict[str, Plan] = OrderedDict()
        self._failures: OrderedDict[str, Failure] = OrderedDict()
        self._limit = memory
        self._disk = (
            None
            if directory is None
            else DiskStore(directory, operator_names=operator_names, limit=files)
        )

    def get(self, digest: str) -> Plan | None:
        """Return the plan of ``digest`` from memory, else from the disk, else None.

        What is wrong with a file is a ``RuntimeWarning`` and a miss. The manifest's guards are
        not looked at: they speak of the model, which only the caller has.

        Raises:
            CacheError: when ``digest`` is not 8 to 128 lower-case hexadecimal digits.
        """
        if (plan := self._memory.get(check_digest(digest))) is not None:
            self._memory.move_to_end(digest)
            self.hits_memory += 1
            return plan
        if self._disk is not None and (plan := self._disk.read(digest)) is not None:
            _keep(self._memory, digest, plan, self._limit)
            self.hits_disk += 1
            return plan
        self.misses += 1
        return None

    def put(self, digest: str, plan: Plan) -> None:
        """Keep ``plan`` under ``digest``, in place of any older one.

        A disk that cannot be written is one ``RuntimeWarning``; the plan stays in memory.

        Raises:
            CacheError: when ``digest`` is not 8 to 128 lower-case hexadecimal digits.
        """
        _keep(self._memory, check_digest(digest), plan, self._limit)
        if self._disk is not None:
            self._disk.write(digest, plan)

    def get_failure(self, digest: str) -> tuple[Failure, Path | None] | None:
        """Return why there is no plan, and the file that says so where it is not in memory.

        As with :meth:`get`, what is wrong with a file is a ``RuntimeWarning``, and guards are not
        looked at.
        """
        if (failure := self._failures.get(check_digest(digest))) is not None:
            return failure, None
        if self._disk is not None and (failure := self._disk.read_failure(digest)) is not None:
            return failure, self._disk.path(digest)
        return None

    def put_failure(self, digest: str, failure: Failure, *, on_disk: bool) -> None:
        """Keep ``failure`` under ``digest``, in place of any older one."""
        _keep(self._failures, check_digest(digest), failure, self._limit)
        if on_disk and self._disk is not None:
            self._disk.write_failure(digest, failure)


def _keep(memory: OrderedDict[str, _T], digest: str, value: _T, limit: int) -> None:
    memory[digest] = value
    memory.move_to_end(digest)
    while len(memory) > limit:
        memory.popitem(last=False)
