"""The canonical graph of a plain module, by symbolic tracing: no capture, no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..passes.contract import Context
from ..passes.driver import run_passes
from ..passes.pipeline import NORMALIZE
from .probe import ProbingBuilder


class _Tracer(fx.Tracer):
    """Traces through every module; parameters and buffers become placeholders."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def trace(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> fx.Graph:
    """The canonical graph of ``module(**inputs)``, all inputs [B, T] with B and T symbolic.

    Args:
        module: Written without branches on values; its parameters keep their qualified names.
        dtypes: Of each input, by the name of the argument.
    """
    traced = _Tracer().trace(module)
    build = ProbingBuilder()
    held = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    made: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        if node.op == "placeholder":
            dtype = dtypes[str(node.target)]
            made[node] = build.input(str(node.target), build.batch, build.tokens, dtype=dtype)
        elif node.op == "get_attr":
            made[node] = _weight(build, str(node.target), held[str(node.target)])
        elif node.op == "output":
            build.output(fx.map_arg(node.args[0], made.__getitem__))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
            made[node] = build.raw(node.target, *args, path=_path(node), **kwargs)
    run_passes(build.graph, NORMALIZE, Context())
    return build.graph


def _weight(build: ProbingBuilder, name: str, tensor: Tensor) -> fx.Node:
    parameter = isinstance(tensor, nn.Parameter)
    return build.weight(name, *tensor.shape, dtype=tensor.dtype, parameter=parameter)


def _path(node: fx.Node) -> str:
    """The qualified name of the innermost module that was being called."""
    stack: Sequence[Any] = tuple((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
