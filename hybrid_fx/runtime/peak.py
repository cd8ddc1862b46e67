"""How much memory a prepare holds at most, from the manifest of its plan alone."""

from __future__ import annotations

import math

import torch

from ..passes import folding, packing
from ..passes.layers import layer_of
from ..passes.packing import PLAIN, Forms
from ..plan.plan import Manifest
from ..plan.records import Prepared, Weight


def prepare_peak_bytes(
    manifest: Manifest, device: torch.device, *, gathers: bool, forms: Forms
) -> int:
    """An upper bound of what a prepare holds at once: all it keeps, and what it makes of that.

    The latter is what one layer gathers, folds and joins before it is copied or packed, the pieces
    in which weights are folded and packed, and at first what is packed before it is put in place.

    Args:
        gathers: Whether weights are sharded, so that all that is prepared is gathered or made.
        forms: What is packed, and how.
    """
    kept, packing_at_once = 0, 0
    made: dict[str, int] = {}

    def make(tensor: Weight | Prepared) -> None:
        """Outside of layers, each is for itself."""
        layer = layer_of(tensor.name) or tensor.name
        made[layer] = made.get(layer, 0) + _nbytes(tensor)

    for tensor in manifest.prepared:
        form = forms.get(getattr(torch, tensor.dtype), PLAIN) if tensor.packed else PLAIN
        packed = form.dtype
        size = packing.most_bytes(tensor.shape, packed) if packed else _nbytes(tensor)
        if tensor.owns_memory or packed or gathers:
            kept += size
        if packed:
            pieces = packing.piece_bytes(tensor.shape, packed)
            packing_at_once = max(packing_at_once, size, pieces)
        elif tensor.owns_memory:
            make(tensor)
    for weight in (*(manifest.weights if gathers else ()), *_folded(manifest)):
        make(weight)
    folds = max(made.values(), default=0) + _piece_bytes(manifest, device)
    return kept + folds + packing_at_once


def measure_peak_bytes(manifest: Manifest, device: torch.device, *, gathers: bool) -> int:
    """An upper bound of what measuring folds holds: a gathered weight, folded ones, pieces."""
    sizes = {_nbytes(weight) for weight in _folded(manifest)}  # memory of a size is used again
    gathered = max(sizes, default=0) if gathers else 0
    return gathered + sum(sizes) + _piece_bytes(manifest, device)


def _folded(manifest: Manifest) -> list[Weight]:
    """The weights at the places where adapters are folded, those of the adapters included."""
    sites = [f".{site}." for site in manifest.lora]
    return [weight for weight in manifest.weights if any(site in weight.name for site in sites)]


def _piece_bytes(manifest: Manifest, device: torch.device) -> int:
    """Of the pieces of all folds; those of one size are the same memory."""
    return sum(
        {
            folding.piece_bytes(weight.shape, getattr(torch, weight.dtype), device)
            for weight in _folded(manifest)
        }
    )


def _nbytes(tensor: Weight | Prepared) -> int:
    return int(math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize)
