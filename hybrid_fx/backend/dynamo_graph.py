"""The seam to Dynamo: what its graphs say of themselves, in the words that passes read.

Dynamo records the modules a call stands in as ``nn_module_stack``, ``{key: (path, class)}`` with
paths such as ``L['self'].model.layers.0.mlp``, and fake values as ``example_value``. Parameters
and buffers come as placeholders whose fake values know whether they are parameters. Tried on
torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

#: The variable through which the compiled function reaches its module: L['self'], G['model'].
_VARIABLE = re.compile(r"^[LG]\[[^\]]*\]\.?")

_GRAD_MODE = ("_set_grad_enabled", "_enter_inference_mode", "inference_mode")


def module_path(node: fx.Node) -> str:
    """The qualified name of the module a node stands in, as seen from the compiled one."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = next(reversed(stack.values()))
    return _VARIABLE.sub("", str(path))


def describe(work: fx.Graph) -> None:
    """Fill in, on a working copy, where each node stands, its value, and what inputs are."""
    for node in work.nodes:
        val = node.meta.get("val", node.meta.get("example_value"))
        node.meta |= {"path": module_path(node), "val": val}
        if node.op == "placeholder":
            if isinstance(val, nn.Parameter):
                node.meta |= {"weight": node.name, "parameter": True}
            else:
                node.meta["input"] = node.name


def is_training(graph: fx.Graph) -> bool:
    """Whether autograd may record calls of a graph that is compiled now."""
    switches = any(
        getattr(node.target, "__name__", "") in _GRAD_MODE and node.args[:1] != (False,)
        for node in graph.nodes
        if node.op == "call_function"
    )
    return torch.is_grad_enabled() or switches


@contextlib.contextmanager
def without_guards(graph: fx.Graph) -> Iterator[None]:
    """Ask no question about a symbolic size that would have Dynamo compile again."""
    values = (node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder")
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    shapes = getattr(mode, "shape_env", None)
    with shapes.suppress_guards() if shapes is not None else contextlib.nullcontext():
        yield


def module_of(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module that runs ``graph`` and carries all that Dynamo hung on ``gm``."""
    graph._codegen = gm.graph._codegen
    new = fx.GraphModule(gm, graph, type(gm).__name__)
    for name, value in vars(gm).items():
        if name not in vars(new):
            new.__dict__[name] = value
    new.meta = dict(gm.meta)
    return new


def lower(inner: Any, gm: fx.GraphModule, example_inputs: list[Any], mode: str | None) -> Any:
    """Hand a graph to one of torch's own backends by its name, or to a function."""
    if callable(inner):
        return inner(gm, example_inputs)
    from torch._dynamo.backends.registry import lookup_backend

    backend: Any = lookup_backend(inner)
    if mode:
        patches = torch._inductor.list_mode_options(mode)
        return backend(gm, example_inputs, config_patches=patches)
    return backend(gm, example_inputs)
