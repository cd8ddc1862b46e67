"""``examples/grpo.py --zero``: the demonstration on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'hybrid_fx[deepspeed]'")
pytest.importorskip("peft", reason="needs peft: pip install 'hybrid_fx[peft]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'hybrid_fx[test]'")

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "grpo.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
QUICK = ("--quick", "--warmup-steps", "2", "--held-out", "4", "--iterations", "2")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        (sys.executable, *command),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=500,
    )


def _holds(done: subprocess.CompletedProcess[str], out: Path, stage: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if " tok/s" in line]
    assert [line[0] for line in lines] == ["1/2", "2/2"], "one rank prints"
    assert f"under ZeRO-{stage} on 2 processes" in done.stdout
    assert "left the rewritten graphs" not in done.stdout
    found = re.findall(r"gather weights.*\(([\d.]+)% of the rollouts\)", done.stdout)
    assert len(found) == (stage == "3")
    assert all(0 < float(share) < 100 for share in found)
    assert ("gather" in lines[1]) == (stage == "3")
    assert (out / "grpo.png").exists()


@pytest.mark.deep
def test_the_demonstration_starts_its_processes_and_shows_the_share_of_gathering(
    tmp_path: Path,
) -> None:
    options = ("--zero", "3", "--nproc", "2", "--lora", "--out", str(tmp_path))
    _holds(run(SCRIPT, *QUICK, *options), tmp_path, "3")


@pytest.mark.deep
@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_the_demonstration_runs_under_torchrun(tmp_path: Path, stage: str) -> None:
    options = ("--zero", stage, "--rows-at-once", "4", "--epochs", "2", "--out", str(tmp_path))
    _holds(run(*TORCHRUN, SCRIPT, *QUICK, *options), tmp_path, stage)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nproc", "3"), "--nproc needs --zero"),
        (("--zero", "3", "--nproc", "3"), "multiple of the 3 processes"),
        (("--zero", "1", "--held-out", "1"), "each of 2 processes needs one"),
        (("--zero", "1", "--control"), "for one process"),
        (("--zero", "4"), "invalid choice"),
    ],
)
def test_options_that_do_not_fit_several_processes_are_refused(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from arithmetic_grpo.options import parse
    finally:
        sys.path.remove(str(ROOT / "examples"))
    with pytest.raises(SystemExit):
        parse(options)
    assert said in capsys.readouterr().err
