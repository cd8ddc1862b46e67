"""The script in examples/, started as its first lines say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")

SCRIPT = Path(__file__).parents[2] / "examples" / "deepspeed_script.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def rewards(*command: str) -> list[float]:
    """Run the script on two processes; the reward of each step."""
    paths = [str(SCRIPT.parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| gather" in done.stdout
    return [float(found) for found in re.findall(r"reward ([\d.]+)", done.stdout)]


def test_the_script_runs_under_torchrun() -> None:
    assert len(rewards(*TORCHRUN, str(SCRIPT), "--zero", "3", "--steps", "3")) == 3


@pytest.mark.deep
@pytest.mark.parametrize("stage", ["0", "3"])
def test_the_script_learns(stage: str) -> None:
    found = rewards(*TORCHRUN, str(SCRIPT), "--zero", stage)
    assert sum(found[-5:]) / 5 > sum(found[:5]) / 5 + 0.1


@pytest.mark.deep
def test_the_script_runs_under_deepspeeds_launcher() -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.exists():
        found = shutil.which("deepspeed")
        if found is None:
            pytest.skip("needs the `deepspeed` command on the PATH")
        launcher = Path(found)
    steps = ("--zero", "3", "--steps", "3")
    assert len(rewards(sys.executable, str(launcher), "--num_gpus", "2", str(SCRIPT), *steps)) == 3
