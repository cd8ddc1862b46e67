"""Memory does not grow with the variety of shapes: a loop of generate, train and step, for long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("soak.py")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads VmRSS from /proc/self/status: Linux only"
)


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
