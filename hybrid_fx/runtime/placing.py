"""Place a packed weight in memory of ours: the seam to the C interface of torch's AOTInductor.

oneDNN's packing allocates what it returns, and Python has no way to say where. Compiled models
make opaque tensors of bytes that lie in a file; so does this, of bytes in any memory. The
functions keep their signatures from release to release; used with torch 2.11 and 2.13.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..passes.packing import packed_bytes

_DTYPES = {torch.bfloat16: "aoti_torch_dtype_bfloat16", torch.float32: "aoti_torch_dtype_float32"}
_MAKE = "aoti_torch_create_tensor_from_blob_v2"
_OTHERS = ("aoti_torch_device_type_cpu", "aoti_torch_layout__mkldnn")


def place(packed: Tensor, memory: Tensor) -> Tensor:
    """A copy of a packed weight that lies in ``memory`` and keeps it alive, see :func:`lay_out`.

    Returns:
        ``packed`` itself where torch offers no such thing.
    """
    placed = lay_out(packed, memory)
    if placed is None:
        return packed
    ctypes.memmove(memory.data_ptr(), torch.ops.mkldnn.data_ptr(packed), packed_bytes(packed))
    return placed


def lay_out(packed: Tensor, memory: Tensor) -> Tensor | None:
    """What is in ``memory``, as a packed weight in the layout of another; it keeps it alive.

    Args:
        packed: From :func:`hybrid_fx.passes.packing.pack`.
        memory: uint8, at least the packed bytes, at a multiple of 64 bytes.
    """
    shim = _shim()
    if shim is None or packed.dtype not in _DTYPES:
        return None
    layout = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    sizes = (ctypes.c_int64 * packed.dim())(*packed.shape)
    made = ctypes.c_void_p()
    failed = getattr(shim, _MAKE)(
        ctypes.c_void_p(memory.data_ptr()),
        ctypes.c_int64(packed.dim()),
        sizes,
        sizes,  # for strides: an opaque tensor has none
        ctypes.c_int64(0),
        ctypes.c_int32(getattr(shim, _DTYPES[packed.dtype])()),
        ctypes.c_int32(shim.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),
        ctypes.byref(made),
        ctypes.c_int32(shim.aoti_torch_layout__mkldnn()),
        ctypes.c_void_p(layout.data_ptr()),
        ctypes.c_int64(layout.numel()),
    )
    if failed:
        return None
    # In the plural: the function for one of them takes a second reference, and leaks it.
    (placed,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(made)])
    # It does not own its bytes, and must not outlive them.
    placed._memory = memory  # type: ignore[attr-defined]
    return placed


@functools.cache
def _shim() -> Any:
    """The library that torch has loaded already, or None where it lacks the functions."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found = all(hasattr(library, name) for name in (_MAKE, *_OTHERS, *_DTYPES.values()))
        taken = hasattr(torch._C._aoti, "alloc_tensors_by_stealing_from_void_ptrs")
    except (OSError, AttributeError):
        return None
    return library if found and taken else None


def _capsule(pointer: ctypes.c_void_p) -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype = ctypes.py_object
    make.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return make(pointer, None, None)
