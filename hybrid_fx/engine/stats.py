"""What one engine did and how long it took: timers, counters, and one record per iteration.

An iteration runs from one switch to generating to the next (``eval()`` to ``eval()``), as in
DeepSpeed's HybridEngine, whose line of latencies :class:`Stats` logs. Time is *exclusive*: a timer
inside another takes its seconds away from the outer one, so parts never add up to more than the
whole.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from .iteration import Iteration, per_second

_LOG = logging.getLogger("hybrid_fx")
_N = TypeVar("_N", int, float)

#: The events an engine counts; :meth:`Stats.count` takes no other name.
COUNTERS: tuple[str, ...] = (
    "captures",  # graphs captured by tracing the model
    "cache_hits_memory",  # plans found in this process
    "cache_hits_disk",  # plans read from the disk cache
    "prepares",  # runs of the prepare graph
    "generate_calls",  # calls of generate, whatever path they took
    "recordings",  # decode steps recorded, to be replayed
    "hf_forwards",  # forwards of the HF module while generating
    "train_graph_calls",  # training forwards that ran on the training graph
)


def log_record(record: object) -> None:
    """Log the line of one iteration at INFO."""
    _LOG.info("%s", record)


class Timer:
    """One span of time, used as ``with stats.timer("decode") as span: span.tokens += rows``.

    Attributes:
        name: What the seconds are counted as.
        tokens: Tokens handled inside; may be set or raised until the end of the block.
    """

    __slots__ = ("_stats", "name", "tokens")

    def __init__(self, stats: Stats, name: str, tokens: int) -> None:
        self._stats = stats
        self.name = name
        self.tokens = tokens

    def __enter__(self) -> Timer:
        self._stats._enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stats._exit(self)


class Stats:
    """Statistics of one engine. Nothing is shared between two of them.

    Not safe for threads by itself: the engine lets one generate run at a time.

    Args:
        clock: Seconds that only grow.
        synchronize: Called where a timer begins and ends, so that work a GPU still has queued is
            counted where it belongs, e.g. ``torch.cuda.synchronize``. Each call waits for the
            device, so put a timer around a loop over tokens and not inside it. None waits for
            nothing, which is right on a CPU.
        history: How many of the latest iterations :attr:`iterations` keeps. Totals cover all.

    Attributes:
        counters: Event (see :data:`COUNTERS`) to how often it happened.
        fallbacks: Reason to how often a call left the rewritten graphs for it.
        iterations: The latest closed iterations, oldest first.
        waited: Reason to the tokens computed for rows that had finished and stayed in the batch.
        samples: Rows generated so far.
        kv_bytes: Bytes of the KV workspace now.
        kv_bytes_peak: The most it ever held.
        prepared_bytes: Bytes of the prepared tensors that have memory of their own, now.
        recorded_bytes: Bytes that recorded decode steps hold now.
        seconds: Timer name to exclusive seconds so far.
        tokens: Timer name to tokens so far.
        on_record: Told each iteration as it is closed; logs its line unless replaced.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
        history: int = 1000,
    ) -> None:
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.fallbacks: Counter[str] = Counter()
        self.waited: Counter[str] = Counter()
        self.iterations: deque[Iteration] = deque(maxlen=history)
        self.samples = 0
        self.kv_bytes = 0
        self.kv_bytes_peak = 0
        self.prepared_bytes = self.recorded_bytes = 0
        self._kv_most = 0  # in this iteration
        self.seconds: dict[str, float] = {}
        self.tokens: Counter[str] = Counter()
        self.on_record: Callable[[Iteration], object] = log_record
        self._clock = clock
        self._synchronize = synchronize
        self._stack: list[Timer] = []
        self._marks: dict[str, tuple[float, float]] = {}
        self._attributed = 0.0
        self._last = 0.0
        self._closed_count = 0
        self._closed_seconds = 0.0
        self._closed_samples = 0
        self._start: float | None = None
        self._before = self._snapshot()

    # -- recording ---------------------------------------------------------------------------

    def timer(self, name: str, tokens: int = 0) -> Timer:
        """Time a ``with`` block as ``name``; blocks may nest, inner seconds leave the outer one.

        ``gather``, ``prepare`` and ``train`` are parts of the logged line; ``generate``,
        ``prefill`` and ``decode`` together are its ``generate``; other names count as others.
        """
        return Timer(self, name, tokens)

    def mark(self, name: str) -> None:
        """Begin a span that no ``with`` block can hold, e.g. training, from ``train()`` on."""
        now = self._now()
        self._open(now)
        self._marks[name] = (now, self._attributed)

    def lap(self, name: str) -> None:
        """Count as ``name`` the time since its mark that no timer took, and mark it anew.

        Called after an optimizer step: what follows the last step, such as scoring of rewards, is
        then not training. Does nothing where ``name`` is not marked; eval() ends all marks.
        """
        if name not in self._marks:
            return
        now = self._now()
        began, attributed = self._marks[name]
        free = (now - began) - (self._attributed - attributed)
        self._attribute(name, max(0.0, free))
        self._marks[name] = (now, self._attributed)

    def count(self, name: str, by: int = 1) -> None:
        """Raise the counter ``name``.

        Raises:
            ValueError: for a name outside :data:`COUNTERS`.
        """
        if name not in COUNTERS:
            raise ValueError(f"counter {name!r} is not known; use one of {', '.join(COUNTERS)}")
        self.counters[name] += by

    def add_samples(self, rows: int) -> None:
        """Count ``rows`` generated sequences."""
        self.samples += rows

    def fallback(self, reason: str) -> None:
        """Count a call, or a part of one, that left the rewritten graphs, by its reason."""
        self.fallbacks[reason] += 1

    def record_kv_bytes(self, size: int) -> None:
        """Say how many bytes the KV workspace holds from now on."""
        self.kv_bytes = size
        self._kv_most = max(self._kv_most, size)
        self.kv_bytes_peak = max(self.kv_bytes_peak, size)

    # -- iterations --------------------------------------------------------------------------

    def next_iteration(self) -> Iteration | None:
        """Close the iteration, hand it to :attr:`on_record`, and begin the next.

        Called where the engine switches to generating. An iteration in which no timer ran and no
        sample came is not closed but goes on: a second ``eval()`` in a row changes nothing.

        Returns:
            The closed iteration; None where there was nothing to close.
        """
        now = self._now()
        self._marks.clear()
        if self._start is None:
            self._open(now)
            return None
        record = self._iteration(now)
        if not record.seconds and not record.samples:
            return None
        self._closed_count += 1
        self._closed_seconds += record.e2e_seconds
        self._closed_samples += record.samples
        self.iterations.append(record)
        self._start = now
        self._before, self._kv_most = self._snapshot(), self.kv_bytes
        self.on_record(record)
        return record

    @property
    def current(self) -> Iteration | None:
        """The open iteration as it stands now; None before anything happened."""
        return None if self._start is None else self._iteration(self._now())

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold. Bytes, seconds, tokens per second."""
        return {
            "iterations": self._closed_count,
            "samples": self.samples,
            "samples_per_second": per_second(self._closed_samples, self._closed_seconds),
            "prefill_tokens_per_second": self.tokens_per_second("prefill"),
            "decode_tokens_per_second": self.tokens_per_second("decode"),
            "seconds": dict(self.seconds),
            "tokens": dict(self.tokens),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_peak": self.kv_bytes_peak,
            "prepared_bytes": self.prepared_bytes,
            "recorded_bytes": self.recorded_bytes,
            "counters": dict(self.counters),
            "fallbacks": dict(self.fallbacks),
            "waited": dict(self.waited),
            "last": self.iterations[-1].as_dict() if self.iterations else None,
        }

    def tokens_per_second(self, name: str) -> float:
        """Tokens over exclusive seconds of the timer ``name``; 0.0 before it ran."""
        return per_second(self.tokens[name], self.seconds.get(name, 0.0))

    # -- inside ------------------------------------------------------------------------------

    def _enter(self, timer: Timer) -> None:
        self._wait()
        self._open(self._now())
        self._stack.append(timer)

    def _exit(self, timer: Timer) -> None:
        try:
            self._wait()
        finally:
            self._now()
            while self._stack and self._stack.pop() is not timer:
                pass
            if timer.tokens:
                self.tokens[timer.name] += timer.tokens

    def _wait(self) -> None:
        if self._synchronize is not None:
            self._synchronize()

    def _now(self) -> float:
        """Read the clock; the time since the last reading belongs to the innermost timer."""
        now = self._clock()
        if self._stack:
            self._attribute(self._stack[-1].name, now - self._last)
        self._last = now
        return now

    def _attribute(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._attributed += seconds

    def _open(self, now: float) -> None:
        if self._start is None:
            self._start = now

    def _snapshot(self) -> tuple[dict[str, float], dict[str, int], dict[str, int], int]:
        return dict(self.seconds), dict(self.tokens), dict(self.fallbacks), self.samples

    def _iteration(self, now: float) -> Iteration:
        seconds, tokens, fallbacks, samples = self._before
        begun = now if self._start is None else self._start
        rows, lasted = self.samples - samples, now - begun
        return Iteration(
            index=self._closed_count,
            e2e_seconds=lasted,
            seconds=_since(self.seconds, seconds),
            tokens=_since(self.tokens, tokens),
            samples=rows,
            average_samples_per_second=per_second(
                self._closed_samples + rows, self._closed_seconds + lasted
            ),
            kv_bytes=self._kv_most,
            fallbacks=_since(self.fallbacks, fallbacks),
        )


def _since(now: Mapping[str, _N], before: Mapping[str, _N]) -> dict[str, _N]:
    """What ``now`` holds more than ``before``, entries that did not move left out."""
    moved = {name: value - before[name] if name in before else value for name, value in now.items()}
    return {name: value for name, value in moved.items() if value}
