"""One iteration over all ranks: means, maxima and sums of their records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..engine.iteration import Iteration, per_second, readable_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class RanksIteration:
    """The records of one iteration, one of each rank that closed it.

    Attributes:
        ranks: How many ranks there are.
        records: Those that are known, of rank 0 first.
    """

    ranks: int
    records: tuple[Iteration, ...]

    @property
    def seconds(self) -> dict[str, tuple[float, float]]:
        """Mean and maximum over ranks of the whole and of its parts, in seconds."""
        found = {"E2E": _mean_and_most(record.e2e_seconds for record in self.records)}
        for part in self.records[0].parts:
            found[part] = _mean_and_most(record.parts[part] for record in self.records)
        return found

    @property
    def gather_share(self) -> float:
        """Seconds of gathering over those of gathering, preparing and generating, all ranks'."""
        spent = [record.parts for record in self.records]
        gathered = sum(parts["gather"] for parts in spent)
        others = sum(parts["prepare"] + parts["generate"] for parts in spent)
        return per_second(gathered, gathered + others)

    @property
    def samples(self) -> int:
        """Rows generated, all ranks'."""
        return sum(record.samples for record in self.records)

    def tokens(self, name: str) -> tuple[int, float]:
        """Tokens of the timer ``name`` on all ranks, and that over its longest time on one."""
        count = sum(record.tokens.get(name, 0) for record in self.records)
        longest = max(record.seconds.get(name, 0.0) for record in self.records)
        return count, per_second(count, longest)

    def __str__(self) -> str:
        """The line that is logged: means over ranks, and in brackets the most of any."""
        seconds = self.seconds
        whole, longest = seconds.pop("E2E")
        split = [
            f"{part} {mean:.3f} s ({100 * per_second(mean, whole):.1f} %, most {most:.3f} s)"
            for part, (mean, most) in seconds.items()
        ]
        average = sum(record.average_samples_per_second for record in self.records)
        fallbacks: Counter[str] = Counter()
        for record in self.records:
            fallbacks.update(record.fallbacks)
        reasons = [f"{reason} x{times}" for reason, times in fallbacks.items()]
        return " | ".join(
            [
                f"iteration {self.records[0].index}",
                f"{len(self.records)} of {self.ranks} ranks",
                f"E2E {whole:.3f} s (most {longest:.3f} s)",
                *split,
                f"gather share of generating {100 * self.gather_share:.1f} %",
                f"{self.samples} samples, {per_second(self.samples, longest):.2f}/s "
                f"(average {average:.2f}/s)",
                *(
                    f"{name} {count} tokens, {rate:.1f}/s"
                    for name in ("prefill", "decode")
                    for count, rate in [self.tokens(name)]
                ),
                f"KV {readable_bytes(max(record.kv_bytes for record in self.records))}",
                f"fallbacks: {', '.join(reasons) or 'none'}",
            ]
        )


def _mean_and_most(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return sum(found) / len(found), max(found)
