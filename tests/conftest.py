"""Settings of every test: one thread, no network, a cache folder of its own, two profiles."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform

# Before anything imports torch or transformers; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

_SLOW_OK = [HealthCheck.too_slow, HealthCheck.data_too_large]
_IN_CI = bool(os.environ.get("CI"))

settings.register_profile(
    "fast",
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    derandomize=_IN_CI,
    suppress_health_check=_SLOW_OK,
)
settings.register_profile(
    "deep",
    max_examples=400,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=_SLOW_OK,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is none, and say what is missing."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        reason = f"needs a CUDA GPU: torch {torch.__version__} sees none on this machine"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which releases the tests ran on, and what the processor can do."""
    terminalreporter.write_line(f"ran on {ran_on()}")


def ran_on() -> str:
    """The releases that matter, and what torch sees of the processor."""
    import torch

    found = [platform.python_version()]
    for name in ("torch", "transformers", "peft", "accelerate", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    isa = torch.backends.cpu.get_cpu_capability() + (f", oneDNN up to {limit}" if limit else "")
    return f"Python {', '.join(found)}; {isa}"


@pytest.fixture(scope="session", autouse=True)
def usual_forms_of_weights() -> Iterator[None]:
    """What is packed does not depend on how busy the machine is, and takes no time to measure.

    As if each form took as long as any other, and one row a little less with the weight itself.
    """

    from hybrid_fx.runtime import forms

    def seconds(directory: object, dtype: Any) -> dict[str, list[float]]:
        names = forms.names_of(dtype)
        return {name: [0.9 if name == "plain" else 1.0, 1.0, 1.0] for name in names}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_seconds", seconds)
        yield


@pytest.fixture
def ledger() -> Iterator[None]:
    """What lives already is left out of ``memory_ledger``: others left millions of objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Plans are stored in a folder of this test run, never in the user's own.

    All of its processes share it: what one has captured is not captured by another.
    """
    base = tmp_path_factory.getbasetemp()
    run = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = str(run / "cache")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        yield folder
