"""The seam to Dynamo's way through a forward, line by line: what ends it early, and what is said.

``starts_line`` of its interpreter runs at each line that is traced; for the time of one trace it
also looks at the clock, and at what was asked of sizes since the line before. Where upstream has
no such method, a trace runs to its end in silence. Tried on torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch._dynamo import symbolic_convert
from torch._guards import TracingContext

from ..errors import CaptureError, CaptureTimeoutError
from .assumed import decides

logger = logging.getLogger("hybrid_fx")

#: What is patched is one for all threads.
_ONE = threading.RLock()

#: Seconds of tracing before the first line that says so; each further one comes twice as late.
SECONDS_OF_SILENCE = 5.0


class Stopped(BaseException):
    """Ends a trace from inside. No ``Exception``: Dynamo, and what it traces, catch those."""


class Watch:
    """Of one trace in one thread.

    Args:
        name: Of what is traced, for a person.
        timeout: Seconds of tracing; ``None`` is no limit.
        clock: Seconds, from any start.

    Attributes:
        lines: How many lines were traced.
        seconds: How long that took.
        error: Why the trace was stopped, or ``None``.
    """

    def __init__(
        self, name: str, timeout: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lines = 0
        self.seconds = 0.0
        self.error: CaptureError | None = None
        self._name = name
        self._timeout = timeout
        self._clock = clock
        self._speaks = SECONDS_OF_SILENCE
        self._sizes: Any = None
        self._seen = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what this thread traces inside the ``with`` block; other threads wait."""
        with _ONE:
            yield from self._watching()

    def _watching(self) -> Iterator[None]:
        kind, thread, begun = _interpreter(), threading.get_ident(), self._clock()
        before = vars(kind).get("starts_line")

        def starts_line(interpreter: Any, number: int) -> None:
            before(interpreter, number)
            if threading.get_ident() == thread:
                self.seconds = self._clock() - begun
                self._line()

        logger.info("tracing %s", self._name)
        if callable(before):
            kind.starts_line = starts_line
        try:
            yield
        finally:
            if callable(before):
                kind.starts_line = before
            self.seconds = self._clock() - begun
            logger.info("tracing %s took %.1f s", self._name, self.seconds)

    def _line(self) -> None:
        """A line is about to be traced.

        Raises:
            Stopped: where the trace has come to nothing; :attr:`error` says why.
        """
        self.lines += 1
        if condition := self._condition():
            self._stop(CaptureError(for_some_sizes(condition)), lasting=True)
        if self._timeout is not None and self.seconds > self._timeout:
            self._stop(
                CaptureTimeoutError(
                    f"tracing took longer than capture_timeout={self._timeout:g} seconds; "
                    "set it higher, or to None"
                ),
                lasting=False,
            )
        if self.seconds > self._speaks:
            self._speaks *= 2
            limit = "no limit" if self._timeout is None else f"{self._timeout:g} s at most"
            logger.warning(
                "still tracing %s after %.0f s (capture_timeout: %s)",
                self._name,
                self.seconds,
                limit,
            )

    def _condition(self) -> str:
        """What was asked of a size since the line before, and decides; or "".

        Sizes are those of the trace in progress: Dynamo may begin one anew.
        """
        context = TracingContext.try_get()
        sizes = getattr(getattr(context, "fake_mode", None), "shape_env", None)
        if sizes is not self._sizes:
            self._sizes, self._seen = sizes, 0
        if sizes is None:
            return ""
        asked = sizes.guards[self._seen :]
        self._seen += len(asked)
        return next((str(guard.expr) for guard in asked if decides(sizes, guard.expr)), "")

    def _stop(self, error: CaptureError, *, lasting: bool) -> None:
        self.error = error
        error.lasting = lasting
        raise Stopped


def for_some_sizes(conditions: str) -> str:
    """Why a forward that asks this of sizes has no graph."""
    return f"the forward or a hook in it does what it does for some sizes: {conditions}"


def _interpreter() -> Any:
    return getattr(symbolic_convert, "InstructionTranslatorBase", object)
