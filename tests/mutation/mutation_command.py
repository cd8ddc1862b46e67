"""The command: run mutants as asked for, show each with the test that notices it."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mutant import Mutant
from mutants import MUTANTS
from mutation_check import WARM, CheckError, Outcome, check, workers
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent.parent
_STYLES = {"killed": "green", "equivalent": "yellow", "survived": "bold red", "broken": "bold red"}


def table(outcomes: Sequence[Outcome], *, why: bool = False) -> Table:
    """One row a mutant, parts kept together."""
    drawn = Table(title="Mutants and the tests that notice them")
    for name in ("part", "fault", "noticed by", "s"):
        drawn.add_column(name, overflow="fold", justify="right" if name == "s" else "left")
    last = ""
    for outcome in outcomes:
        mutant = outcome.mutant
        said = outcome.test.rpartition("/")[2]
        if outcome.verdict != "killed":
            said = f"{outcome.verdict}: {said or mutant.fault.equivalent or 'no test notices'}"
        if why and outcome.why:
            said = f"{said}\n  {outcome.why[:120]}"
        shown = f"[{_STYLES[outcome.verdict]}]{escape(said)}[/]"
        part = "" if mutant.part == last else mutant.part
        drawn.add_row(part, escape(mutant.fault.what), shown, f"{outcome.seconds:.1f}")
        last = mutant.part
    return drawn


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The counts and the time in one line."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _STYLES)
    parts = len({outcome.mutant.part for outcome in outcomes})
    return f"{len(outcomes)} mutants of {parts} parts: {said}; {seconds / 60:.1f} minutes"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mutants, and the tests that notice them.")
    parser.add_argument("--only", default="", help="a text in the part, the fault or the file")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once (2)")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--why", action="store_true", help="show what the test said as well")
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str] | None = None,
    *,
    root: Path = ROOT,
    mutants: Sequence[Mutant] = MUTANTS,
    warm: Sequence[str] = WARM,
    console: Console | None = None,
) -> int:
    """Run the check; 0 where every mutant is noticed or equivalent, 1 where not, 2 without one."""
    options = _options(arguments)
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    chosen = [m for m in mutants if options.only in f"{m.part} {m.fault.what} {m.file}"]
    if options.list:
        for mutant in chosen:
            console.print(escape(f"{mutant}  ({mutant.file})"), soft_wrap=True)
        return 0
    if not chosen:
        console.print(escape(f"no mutant has {options.only!r} in its part, fault or file"))
        return 2
    start, done = time.monotonic(), 0

    def told(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        verdict = f"[{_STYLES[outcome.verdict]}]{outcome.verdict}[/]"
        line = f"{done}/{len(chosen)} {verdict} {escape(str(outcome.mutant))}"
        console.print(line, soft_wrap=True, highlight=False)

    try:
        with workers(root, min(options.jobs, len(chosen)), warm) as made:
            console.print(f"{len(chosen)} mutants; first the tests without any")
            outcomes = check(root, chosen, made, told)
    except CheckError as error:
        console.print(escape(str(error)), style="bold red", soft_wrap=True)
        return 2
    console.print(table(outcomes, why=options.why))
    console.print(summary(outcomes, time.monotonic() - start))
    return int(any(outcome.verdict in ("survived", "broken") for outcome in outcomes))
