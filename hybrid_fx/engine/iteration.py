"""The record of one iteration: generate, score, train, and where its time went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Parts of the logged line, and the timers that make up each. What is left is ``others``.
PARTS: Mapping[str, tuple[str, ...]] = {
    "gather": ("gather",),
    "prepare": ("prepare",),
    "generate": ("generate", "prefill", "decode"),
    "train": ("train",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Iteration:
    """One iteration, from one ``eval()`` to the next.

    Attributes:
        index: Iterations closed before this one.
        e2e_seconds: Wall time of the whole iteration.
        seconds: Timer name to its exclusive seconds.
        tokens: Timer name to tokens handled inside.
        samples: Rows generated.
        average_samples_per_second: Over all iterations up to and with this one.
        kv_bytes: The most bytes that the KV workspace held.
        fallbacks: Reason to how often a call left the rewritten graphs.
    """

    index: int
    e2e_seconds: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    samples: int = 0
    average_samples_per_second: float = 0.0
    kv_bytes: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of gather, prepare, generate, train and others; they sum to the whole."""
        parts = {
            part: sum(self.seconds.get(name, 0.0) for name in names)
            for part, names in PARTS.items()
        }
        return parts | {"others": max(0.0, self.e2e_seconds - sum(parts.values()))}

    @property
    def percents(self) -> dict[str, float]:
        """:attr:`parts` in percent of the whole; all 0.0 for an iteration that took no time."""
        whole = self.e2e_seconds
        return {name: 100 * part / whole if whole else 0.0 for name, part in self.parts.items()}

    @property
    def samples_per_second(self) -> float:
        """Rows generated over the wall time of the iteration."""
        return per_second(self.samples, self.e2e_seconds)

    def tokens_per_second(self, name: str) -> float:
        """Tokens over exclusive seconds of the timer ``name``; 0.0 where it did not run."""
        return per_second(self.tokens.get(name, 0), self.seconds.get(name, 0.0))

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data that JSON can hold."""
        return {
            "index": self.index,
            "e2e_seconds": self.e2e_seconds,
            "parts": self.parts,
            "percents": self.percents,
            "seconds": dict(self.seconds),
            "tokens": dict(self.tokens),
            "samples": self.samples,
            "samples_per_second": self.samples_per_second,
            "average_samples_per_second": self.average_samples_per_second,
            "prefill_tokens_per_second": self.tokens_per_second("prefill"),
            "decode_tokens_per_second": self.tokens_per_second("decode"),
            "kv_bytes": self.kv_bytes,
            "fallbacks": dict(self.fallbacks),
        }

    def __str__(self) -> str:
        """The line that is logged."""
        percents = self.percents
        split = [
            f"{part} {took:.3f} s ({percents[part]:.1f} %)" for part, took in self.parts.items()
        ]
        reasons = [f"{reason} x{times}" for reason, times in self.fallbacks.items()]
        return " | ".join(
            [
                f"iteration {self.index}",
                f"E2E {self.e2e_seconds:.3f} s",
                *split,
                f"samples/s {self.samples_per_second:.2f} "
                f"(average {self.average_samples_per_second:.2f})",
                f"prefill {self.tokens_per_second('prefill'):.1f} tokens/s",
                f"decode {self.tokens_per_second('decode'):.1f} tokens/s",
                f"KV {readable_bytes(self.kv_bytes)}",
                f"fallbacks: {', '.join(reasons) or 'none'}",
            ]
        )


def per_second(amount: float, seconds: float) -> float:
    """``amount / seconds``; 0.0 where no time passed."""
    return amount / seconds if seconds > 0 else 0.0


def readable_bytes(size: int) -> str:
    """``size`` in the largest binary unit that keeps it at 1 or more, e.g. ``1.5 MiB``."""
    value, units = float(size), ("KiB", "MiB", "GiB", "TiB")
    if value < 1024:
        return f"{size} B"
    for unit in units:
        value /= 1024
        if value < 1024 or unit == units[-1]:
            break
    return f"{value:.1f} {unit}"
