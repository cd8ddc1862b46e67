"""Running graphs call by call, in their own precision and in float64, and comparing results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.attention import attention
from ..passes.graph import calls, name_of, shape_of
from ..passes.pipeline import copy_graph

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


def run(
    graph: fx.Graph, weights: Mapping[str, Tensor], inputs: Mapping[str, Any], prepared: Any = ()
) -> Any:
    """What a graph returns for these tensors; what it writes, it writes into them."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if "weight" in node.meta:
                values[node] = weights[node.meta["weight"]]
            elif "streamed" in node.meta:
                values[node] = tuple(weights[name] for name in node.meta["streamed"])
            elif "prepared" in node.meta:
                values[node] = prepared[node.meta["prepared"]]
            else:
                values[node] = inputs[node.meta["input"]]
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        function = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
        with torch.no_grad():
            values[node] = function(*args, **kwargs)
    raise ValueError("the graph has no output node; end it with graph.output(...)")


def workspace(graph: fx.Graph, size: tuple[int, int], keep: int) -> dict[str, Any]:
    """The runtime inputs that staging adds: an empty KV workspace of B rows and T positions.

    Args:
        size: (B, T) of the call.
        keep: For how many of the last tokens results are wanted.
    """
    batch, tokens = size
    slots = torch.arange(batch * tokens).reshape(batch, tokens).flip(0).contiguous()
    found: dict[str, Any] = {"keep": keep, "slots": slots, "key_valid": None, "pitch": 0}
    found["embeds"] = None
    for node in calls(graph, "attend_as_configured"):
        found[node.args[0].meta["input"]] = _as_captured  # type: ignore[union-attr]
        found[node.args[4].meta["input"]] = None  # type: ignore[union-attr]
    for node in calls(graph, "attend", "attend_one"):
        for memory, new in zip(node.args[3:5], node.args[1:3], strict=True):
            shape, val = shape_of(new), new.meta["val"]  # type: ignore[union-attr]
            assert shape is not None
            room = (batch, int(shape[1]), tokens, int(shape[3]))
            dtype = val.dtype
            found[memory.meta["input"]] = torch.zeros(room, dtype=dtype)  # type: ignore[union-attr]
    return found


def _as_captured(query: Tensor, key: Tensor, value: Tensor, _: None, *options: Any) -> Tensor:
    out: Tensor = attention(query, key, value, *options)
    return out


def _wide_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normed * (weight + offset)


def _wide_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x + residual, _wide_rms_norm(x + residual, weight, eps)


_WIDE = {"rms_norm": _wide_rms_norm, "add_rms_norm": _wide_add_rms_norm}


def in_float64(graph: fx.Graph) -> fx.Graph:
    """A copy that computes in float64 wherever the graph names a narrower type."""

    def widen(value: Any) -> Any:
        return torch.float64 if value in _NARROW else value

    copy = copy_graph(graph)
    for node in copy.nodes:
        if node.op == "call_function":
            node.target = _WIDE.get(name_of(node) or "", node.target)
            node.args = tuple(
                a if isinstance(a, fx.Node | list | slice) else widen(a) for a in node.args
            )
            node.kwargs = {k: widen(v) for k, v in node.kwargs.items()}
    return copy


def doubled(tensors: Mapping[str, Tensor], noise: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """The tensors in float64, shared memory still shared; with ``noise``, each value shaken."""
    rng = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            wide = tensor.double() if tensor.is_floating_point() else tensor.clone()
            if noise and wide.is_floating_point():
                wide = wide * (1 + noise * torch.randn(wide.shape, generator=rng).double())
            made[id(tensor)] = wide
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def tensors_of(value: Any) -> Iterable[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every value; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
    return torch.equal(a, b)


def distance(a: Tensor, b: Tensor) -> float:
    """The Euclidean distance of two tensors of one shape relative to the size of the second."""
    if not b.numel():
        return 0.0
    gap = float((a.double() - b.double()).norm())
    return gap / max(float(b.double().norm()), 1e-30) if gap else 0.0
