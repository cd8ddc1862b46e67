"""What a user wrote, told from what came with a version."""

from __future__ import annotations

import argparse
import sys
from dataclasses import is_dataclass
from types import ModuleType, SimpleNamespace

from torch import Tensor, nn

# Told by their versions; what is patched in their classes is read with the classes.
_BY_VERSION = frozenset(("torch", "builtins", "hybrid_fx")) | sys.stdlib_module_names

# Their modules hold registries that fill up with what a process does, and no settings of a user's.
_LIBRARIES = frozenset(
    "transformers peft accelerate deepspeed trl huggingface_hub safetensors tokenizers numpy "
    "packaging triton einops liger_kernel bitsandbytes torchao flash_attn xformers wandb "
    "tqdm".split()
)


def is_by_version(module_name: str) -> bool:
    """Whether a version number stands for the files of this Python module."""
    return module_name.partition(".")[0] in _BY_VERSION


def is_users(module_name: str) -> bool:
    """Whether a Python module is neither told by a version nor of the libraries around it.

    Generated code, of fx and Dynamo, has no name and is nobody's.
    """
    first = module_name.partition(".")[0]
    return bool(first) and not is_by_version(module_name) and first not in _LIBRARIES


def is_record(value: object) -> bool:
    """Whether an object is one that holds settings: a namespace, a dataclass, a user's own."""
    if isinstance(value, type | nn.Module | Tensor | ModuleType):
        return False
    if isinstance(value, SimpleNamespace | argparse.Namespace) or is_dataclass(value):
        return True
    return hasattr(value, "__dict__") and is_users(type(value).__module__)
