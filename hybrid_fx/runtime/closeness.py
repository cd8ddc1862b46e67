"""How far two ways to compute the same logits may be apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.plan import Manifest

#: Allowed relative distance of the logits (Euclidean), by dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def distance_of(got: Tensor, wanted: Tensor) -> float:
    """The Euclidean distance of two tensors, relative to the second.

    Infinities must stand in the same places, as those of a hook that bans tokens.
    """
    alike = wanted.isinf() & (got == wanted)
    wide = wanted.float().masked_fill(alike, 0)
    return float((got.float().masked_fill(alike, 0) - wide).norm() / wide.norm().clamp_min(1e-30))


def allowed_distance(manifest: Manifest) -> float:
    """By the coarsest dtype that a plan computes in."""
    names = {layer.dtype for layer in manifest.kv} | {tensor.dtype for tensor in manifest.prepared}
    dtypes = [getattr(torch, name) for name in names]
    coarsest = max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)
    return TOLERANCE.get(coarsest, 1e-1)
