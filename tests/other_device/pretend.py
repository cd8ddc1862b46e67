"""The device ``pretend``: memory and kernels of the CPU, and the refusals of a GPU.

What takes a CPU for granted fails on it as it would on a GPU: a tensor made without a device, a
mask that stays on the host. See ``pretend.cpp``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

DEVICE = "pretend"


def register(build_folder: Path) -> Any:
    """Compile the device and add it to torch, for the whole of this process.

    Returns:
        Its default generator.
    """
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # ninja's
    source = Path(__file__).with_name("pretend.cpp")
    build_folder.mkdir(parents=True, exist_ok=True)
    compiled = cpp_extension.load(
        "pretend_device", [str(source)], ["-O1"], build_directory=str(build_folder)
    )
    compiled.register_hooks()
    torch.utils.rename_privateuse1_backend(DEVICE)
    generator = compiled.default_generator()
    torch._register_device_module(DEVICE, _module(generator))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return generator


def _module(generator: Any) -> ModuleType:
    """What torch and transformers ask ``torch.pretend`` for."""
    module: Any = ModuleType(f"torch.{DEVICE}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.synchronize = module._lazy_init = lambda *_: None
    module.device = lambda _: contextlib.nullcontext()
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = generator.manual_seed
    module.get_rng_state = lambda *_: generator.get_state()
    module.set_rng_state = lambda state, *_: generator.set_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module
