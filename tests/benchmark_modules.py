"""Modules and scripts of ``benchmarks/`` for tests: their plain names stay out of this process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def loaded(name: str, **neighbours: ModuleType) -> ModuleType:
    """A module of the benchmarks under a name of its own; ``neighbours`` are those it imports."""
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        for other, stands_for in neighbours.items():
            patch.setitem(sys.modules, other, stands_for)
        spec.loader.exec_module(module)
    return module


def started(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """A script of the benchmarks in a process of its own."""
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *argv],
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
    )
