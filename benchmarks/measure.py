"""Time of things called in turn, and what is made of it: medians of pairwise ratios, spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: Runs once and returns its seconds: of the call, or of what the workload counts of it.
Seconds = Callable[[], float]
#: Greedy generation, by the number of new tokens.
Side = Callable[[int], Any]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Timer:
    """Seconds of a call, the work that a device still has queued included.

    Args:
        device: ``"cpu"``, or what torch calls the device, e.g. ``"cuda"``.
        clock: ``"wall"``, or ``"cpu"`` for processor time where others use the machine too.
    """

    def __init__(self, device: str, clock: str = "wall") -> None:
        self._device, self._clock = device, CLOCKS[clock]

    def now(self) -> float:
        """The clock, after the device is done."""
        if self._device != "cpu":
            torch.get_device_module(self._device).synchronize()
        return self._clock()

    def __call__(self, step: Callable[[], object]) -> float:
        """Run ``step`` once."""
        start = self.now()
        step()
        return self.now() - start


def seconds_a_token(generate: Side, new: int, timer: Timer) -> float:
    """Time of ``new`` tokens less that of one, for each token in between."""
    first = timer(lambda: generate(1))
    return (timer(lambda: generate(new)) - first) / (new - 1)


def in_turn(sides: Mapping[str, Seconds], repeat: int) -> dict[str, list[float]]:
    """Seconds of every side, ``repeat`` turns A B C A B C; warm them up before."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, seconds in sides.items():
            times[name].append(seconds())
    return times


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the ratios b / a, each of one turn."""
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
    }


def compared(what: str, a: Sequence[float], b: Sequence[float], **more: Any) -> dict[str, Any]:
    """A row: medians of the seconds of both sides, and of the ratios b / a of one turn."""
    return {
        "what": what,
        **more,
        "a_ms": 1000 * statistics.median(a),
        "b_ms": 1000 * statistics.median(b),
        **ratio(a, b),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest, in milliseconds."""
    return {
        "ms": 1000 * statistics.median(seconds),
        "ms_min": 1000 * min(seconds),
        "ms_max": 1000 * max(seconds),
    }
