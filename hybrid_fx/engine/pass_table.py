"""What each pass did to a model's graphs, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass over one of the graphs, as it was when the plan was built.

    Attributes:
        stage: ``model`` (the captured graph), ``layers`` (by policy, then staged), ``prefill``,
            ``decode`` or ``training``.
        name: Of the pass; ``hoist`` is the step that moves what depends on weights to prepare.
        count: Places rewritten.
        added, removed: Operators of which there are more, or fewer, behind it, and how many.
        declined: Places where it declined; the table of layers says why.
        seconds: How long it took.
    """

    stage: str
    name: str
    count: int
    added: Mapping[str, int]
    removed: Mapping[str, int]
    declined: int
    seconds: float


def pass_reports(rows: Sequence[Any]) -> tuple[PassReport, ...]:
    """From the rows of a manifest."""
    return tuple(PassReport(**row) for row in rows)


def pass_table(reports: Sequence[PassReport]) -> Table:
    """One row a pass, in the order in which they ran."""
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=False)
    table.add_column("stage", style="cyan")
    table.add_column("pass", overflow="fold")
    for title in ("places", "declined"):
        table.add_column(title, justify="right")
    table.add_column("nodes added", style="green", overflow="fold", ratio=1)
    table.add_column("nodes removed", style="yellow", overflow="fold", ratio=1)
    table.add_column("ms", justify="right")
    stage = ""
    for report in reports:
        table.add_row(
            "" if report.stage == stage else report.stage,
            Text(report.name),
            str(report.count),
            str(report.declined or "-"),
            Text(_counts(report.added)),
            Text(_counts(report.removed)),
            f"{1000 * report.seconds:.1f}",
        )
        stage = report.stage
    return table


def _counts(kinds: Mapping[str, int], shown: int = 4) -> str:
    """``12 mul, 6 add``, the most frequent first; beyond ``shown`` kinds their sum."""
    order = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    if len(order) == shown + 1:  # no longer than what would stand for it
        shown += 1
    text = [f"{count} {kind}" for kind, count in order[:shown]]
    if rest := order[shown:]:
        text.append(f"{sum(count for _, count in rest)} of {len(rest)} other kinds")
    return ", ".join(text) or "-"
