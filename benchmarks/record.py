"""Results as a table, and as a dated file that says what was measured where."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import hybrid_fx

Row = dict[str, Any]
#: A heading, and the cell of a row under it.
Column = tuple[str, Callable[[Row], str]]
FOLDER = Path(__file__).parent / "results"

#: Variables that keep libraries from instructions that the processor has.
_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")

#: Arguments that say where things lie on a machine.
_PLACES = ("folder", "environment")


def cell(key: str, form: str = "") -> Callable[[Row], str]:
    """The value of ``key`` in the format ``form``; a dash where the row has none."""
    return lambda row: "-" if row.get(key) is None else format(row[key], form)


def spread_of(key: str, form: str) -> Callable[[Row], str]:
    """Least to greatest of what ``key`` is the median of; a dash where the row has none."""
    return lambda row: (
        "-" if key not in row else f"{row[f'{key}_min']:{form}}-{row[f'{key}_max']:{form}}"
    )


#: Of two sides, a and b.
COMPARED: tuple[Column, ...] = (
    ("b / a", cell("what")),
    ("b, ms", cell("b_ms", ".1f")),
    ("a, ms", cell("a_ms", ".1f")),
    ("ratio", cell("ratio", ".2f")),
    ("spread", spread_of("ratio", ".2f")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a workload measured.

    Attributes:
        rows: One for each figure; a row with ``error`` says what could not be measured and why.
        columns: The table.
        limits: What the machine gave in the same run.
        notes: Lines under the table.
    """

    rows: Sequence[Row]
    columns: Sequence[Column] = COMPARED
    limits: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


def show(result: Result, title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for index, (heading, _) in enumerate(result.columns):
        table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for row in result.rows:
        table.add_row(*(text(row) for _, text in result.columns))
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    limits = ", ".join(f"{name} {value:.4g}" for name, value in result.limits.items())
    failed = [f"{row['what']}: {row['error']}" for row in result.rows if "error" in row]
    for line in (*([limits] if limits else []), *result.notes, *failed):
        console.print(line, markup=False, highlight=False)


def machine(device: str) -> dict[str, Any]:
    """The processor, its memory, and the device."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in flags if flag in ("avx2", "avx512f", "avx512_bf16")]
        + [flag for flag in flags if flag.startswith("amx")],
        "memory_gib": round(pages / 2**30, 1),
        "threads": torch.get_num_threads(),
        "limited_to": {name: os.environ[name] for name in _LIMITS if name in os.environ},
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
    }


def save(result: Result, args: argparse.Namespace, name: str, **versions: str) -> Path:
    """Write rows, machine, versions and date to ``--folder``; returns the path.

    Args:
        versions: Of what took part beside torch, transformers and hybrid_fx.
    """
    modules = (torch, transformers, hybrid_fx)
    date = datetime.date.today().isoformat()
    record = {
        "date": date,
        "name": name,
        "arguments": {k: v for k, v in vars(args).items() if k not in _PLACES},
        "machine": machine(args.device),
        "versions": {module.__name__: module.__version__ for module in modules} | versions,
        "limits": dict(result.limits),
        "notes": list(result.notes),
        "rows": list(result.rows),
    }
    folder = Path(getattr(args, "folder", None) or FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")
    return path
