"""Memory does not grow with the variety of shapes: a loop of generate, train and step, for long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.soak_loop import soak

from hybrid_fx.passes import packing
from hybrid_fx.passes.row_buckets import MOST, bucket

SCRIPT = Path(__file__).with_name("soak_loop.py")

ON_LINUX = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads VmRSS from /proc/self/status: Linux only"
)


@ON_LINUX
def test_twelve_cycles_of_random_shapes_run_products_of_few_numbers_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: set[int] = set()
    product = packing._product

    def counted(x: Any, *others: Any) -> Any:
        rows.add(x.numel() // x.shape[-1])
        return product(x, *others)

    monkeypatch.setattr(packing, "_product", counted)
    soak(cycles=12, check=4, longest=40)
    assert rows <= {bucket(count) for count in range(1, MOST + 1)}
    assert bool(rows) == packing.packs(torch.device("cpu"), torch.float32)


@ON_LINUX
@pytest.mark.deep
def test_memory_stays_where_it_was_after_a_third_of_300_cycles_of_random_shapes() -> None:
    given = {"cycles": 300, "check": 25, "longest": 60}
    held = run(given)
    rise = max(held[100:]) - held[100]
    print(f"{held[100]:.0f} MiB after a third, {rise:.1f} MiB more at most")
    assert rise < 20


def run(given: dict[str, object]) -> list[float]:
    """What the script printed, from a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(given)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    held: list[float] = json.loads(done.stdout.splitlines()[-1])
    return held
