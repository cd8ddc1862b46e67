"""Results as a table, and as a dated file that says what was measured where."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import hybrid_fx


def compared(what: str, pairs: Sequence[tuple[float, float]], **more: Any) -> dict[str, Any]:
    """A row: medians of seconds of both sides, a and b, and of the ratios b / a of one turn."""
    ratios = sorted(b / a for a, b in pairs)
    return {
        "what": what,
        **more,
        "a_ms": 1000 * statistics.median(a for a, _ in pairs),
        "b_ms": 1000 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
    }


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("b / a", "b, ms", "a, ms", "ratio", "spread"):
        table.add_column(column, justify="left" if column == "b / a" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["what"],
            f"{row['b_ms']:.1f}",
            f"{row['a_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
        )
    Console().print(table)


def save(rows: Sequence[dict[str, Any]], args: argparse.Namespace, name: str, **more: Any) -> None:
    """Write the rows to ``benchmarks/results``, with the machine, the versions and the date."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
    }
    versions = {m.__name__: m.__version__ for m in (torch, transformers, hybrid_fx)} | more
    record = {
        "arguments": vars(args),
        "machine": machine,
        "versions": versions,
        "rows": list(rows),
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = f"{datetime.date.today().isoformat()}-{name}.json"
    (folder / name).write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: benchmarks/results/{name}")
