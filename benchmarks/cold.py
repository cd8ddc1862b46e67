"""cold: from ``hybridize(model)`` to the first token in a new process, by depth and disk cache.

Every figure is a process of its own, which imports torch and transformers and builds the model
before the clock starts; importing hybrid_fx is counted. In a turn the first process finds an empty
cache folder, the second what the first left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import spread
from record import Column, Result, Row, cell, spread_of
from shapes import SHAPES

REPEAT = 3
COLUMNS: tuple[Column, ...] = (
    ("first token", cell("what")),
    ("ms", cell("ms", ".0f")),
    ("spread", spread_of("ms", ".0f")),
    ("of it prepare, ms", cell("prepare_ms", ".0f")),
    ("prefill again, ms", cell("prefill_ms", ".0f")),
    ("captures", cell("captures")),
)
Figures = dict[str, float]


def in_a_process(folder: str, layers: int, args: argparse.Namespace) -> Figures:
    """What a new process with its caches under ``folder`` measured.

    Raises:
        RuntimeError: with the end of its output, where it failed.
    """
    asked = {
        name: getattr(args, name)
        for name in ("shape", "dtype", "device", "graph", "prompt", "options", "clock", "threads")
    }
    given = json.dumps({**asked, "layers": layers, "folder": folder})
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    script = Path(__file__).with_name("cold_process.py")
    done = subprocess.run(
        [sys.executable, str(script), given],
        env=os.environ | caches,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"a process of cold failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _row(what: str, figures: list[Figures]) -> Row:
    row = {"what": what, **spread([each["seconds"] for each in figures])}
    for name in ("prepare", "prefill"):
        row[f"{name}_ms"] = 1000 * statistics.median(each[name] for each in figures)
    return row | {"captures": max(int(each["captures"]) for each in figures)}


def run(args: argparse.Namespace) -> Result:
    """Empty cache and warm disk cache, at each of ``--layers`` up to those of the shape."""
    most = SHAPES[args.shape]().num_hidden_layers
    rows: list[Row] = []
    for layers in sorted({min(layers, most) for layers in args.layers}):
        cold, warm = [], []
        for _ in range(args.repeat):
            with tempfile.TemporaryDirectory() as folder:
                cold.append(in_a_process(folder, layers, args))
                warm.append(in_a_process(folder, layers, args))
        rows.append(_row(f"{layers} layers, no cache", cold))
        rows.append(_row(f"{layers} layers, warm disk cache", warm))
    return Result(rows=rows, columns=COLUMNS, notes=("batch 1; every figure a process of its own",))
