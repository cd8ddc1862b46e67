"""A plugin of pytest: tests run on another device than the CPU, as they stand.

Models and prompts of ``tiny_models`` and the tensors that a test or a helper of tests makes lie on
that device, and the random state that they look at is the device's. The library is not touched:
what it makes itself, it has to make there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tape
import tiny_models
import torch
from other_device import pretend
from torch import Tensor

_MAKERS = "arange as_tensor empty eye full linspace ones rand randint randn randperm tensor zeros"

#: What no test of these can show on this device, and why.
_NOT_HERE = {
    "[numpy]": "numpy writes into memory of a CPU",
    "moe]": "experts count their tokens by a kernel that GPUs have and CPUs lack",
    "test_a_mixture_trains": "experts count their tokens by a kernel that GPUs have and CPUs lack",
    "test_a_model_that_went_where_nothing_records_says_so": "it goes to a CPU from one",
}


class _Torch(ModuleType):
    """``torch`` in the eyes of a test: what it makes, and the random state, are the device's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Tensor:
        if options.get("device") is not None:
            return make(*args, **options)
        learns = options.pop("requires_grad", False)
        return make(*args, **options).to(pretend.DEVICE).requires_grad_(learns)

    return made


_TORCH: Any = _Torch("torch")
vars(_TORCH).update({name: _on_device(getattr(torch, name)) for name in _MAKERS.split()})


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is read."""
    generator = pretend.register(Path(config.rootpath) / "build" / pretend.DEVICE)
    tiny, prompt = tiny_models.tiny, tiny_models.prompt
    tiny_models.tiny = lambda *args, **options: tiny(*args, **options).to(pretend.DEVICE)
    tiny_models.prompt = lambda *args, **options: {
        name: tensor.to(pretend.DEVICE) for name, tensor in prompt(*args, **options).items()
    }
    _TORCH.get_rng_state, _TORCH.set_rng_state = generator.get_state, generator.set_state
    tape.KIND = pretend.DEVICE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """When all is read and nothing has run."""
    for module in list(_modules_of_tests()):
        vars(module).update({n: _moved(value) for n, value in vars(module).items()})
    for item in items:
        for part, reason in _NOT_HERE.items():
            if part in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))


def _modules_of_tests() -> Iterator[ModuleType]:
    root = Path(tiny_models.__file__).parent
    mine = Path(__file__).parent
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if path.is_relative_to(root) and not path.is_relative_to(mine):
            yield module


def _moved(value: Any) -> Any:
    if value is torch:
        return _TORCH
    if isinstance(value, Tensor):
        return value.to(pretend.DEVICE)
    if type(value) is dict and value and all(isinstance(v, Tensor) for v in value.values()):
        return {name: tensor.to(pretend.DEVICE) for name, tensor in value.items()}
    return value
