"""Graphs as a tracer hands them over: many spellings of one call, and calls that do nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx

from ..passes.effects import written_memory
from ..passes.graph import call, name_of, path_of, shape_of
from ..passes.pipeline import copy_graph
from .draft import is_float
from .example import Example
from .graphs import graphs

#: A call in another spelling: (target, args, kwargs); a target that is text is a method.
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _renamed(*targets: Any) -> tuple[Callable[[Any], _Call], ...]:
    return tuple(lambda args, t=target: (t, args, {}) for target in targets)


def _loose(name: str) -> Callable[[Any], _Call]:
    return lambda args: (name, (args[0], *args[1]), {})


def _keywords(target: Any, *names: str) -> Callable[[Any], _Call]:
    first = len(names)
    return lambda args: (target, args[:-first], dict(zip(names, args[-first:], strict=True)))


_SPELLINGS: Mapping[str, tuple[Callable[[Any], _Call], ...]] = {
    "add": _renamed(torch.add, "add", "__add__"),
    "mul": _renamed(torch.mul, torch.multiply, "mul", "multiply", "__mul__"),
    "sub": _renamed(torch.sub, "sub"),
    "neg": _renamed(torch.neg, "neg"),
    "matmul": _renamed(torch.matmul, "matmul"),
    "pow": (*_renamed(torch.pow, "pow"), _keywords(torch.pow, "exponent")),
    "add_": _renamed(operator.iadd, "add_"),
    "mul_": _renamed(operator.imul, "mul_"),
    "sub_": _renamed(operator.isub, "sub_"),
    "relu": (*_renamed(torch.relu, "relu"), lambda args: (F.relu, (*args, False), {})),
    "silu": (lambda args: (F.silu, (*args, False), {}), _keywords(F.silu, "input")),
    "gelu": (lambda args: (F.gelu, args, {"approximate": "none"}),),
    "softmax": (
        *_renamed(torch.softmax, "softmax"),
        _keywords("softmax", "dim"),
        lambda args: (F.softmax, args, {"_stacklevel": 3}),
    ),
    "linear": (_keywords(F.linear, "bias"), _keywords(F.linear, "weight", "bias")),
    "embedding": (
        _keywords(F.embedding, "weight"),
        lambda args: (F.embedding, (), {"input": args[0], "weight": args[1], "padding_idx": None}),
    ),
    "layer_norm": (_keywords(F.layer_norm, "normalized_shape", "weight", "bias", "eps"),),
    "cat": (*_renamed(torch.concat), _keywords(torch.cat, "dim")),
    "mean": _renamed("mean"),
    "to": _renamed("to", "type"),
    "view": (*_renamed("view"), _loose("view")),
    "reshape": (*_renamed("reshape"), _loose("reshape")),
    "transpose": (*_renamed("transpose"), _keywords("transpose", "dim0", "dim1")),
    "unsqueeze": (*_renamed("unsqueeze"), _keywords(torch.unsqueeze, "dim")),
    "contiguous": _renamed("contiguous"),
    "size": _renamed("size"),
    "chunk": (*_renamed("chunk"), _keywords(torch.chunk, "dim")),
    "t": (*_renamed("t"), lambda args: (getattr, (args[0], "T"), {})),
}

#: Calls that give what they were given.
_IDLE: tuple[tuple[str, Callable[[fx.Node], tuple[Any, ...]]], ...] = (
    ("to", lambda n: (n.meta["val"].dtype,)),
    ("mul", lambda n: (1,)),
    ("mul", lambda n: (1.0,)),
    ("getitem", lambda n: (slice(None),)),
    ("getitem", lambda n: (...,)),
    ("dropout", lambda n: (0.5, False)),
    ("contiguous", lambda n: ()),
)


@st.composite
def captured(draw: st.DrawFn, examples: st.SearchStrategy[Example] | None = None) -> Example:
    """Random graphs in the spellings of a tracer, for passes that normalise them.

    Args:
        examples: Of legal graphs; :func:`~hybrid_fx.testing.graphs.graphs` by default.
    """
    example = draw(graphs() if examples is None else examples)
    graph = copy_graph(example.graph)
    idle = draw(st.lists(st.integers(0, len(_IDLE) - 1), max_size=3))
    written = written_memory(graph)
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        options = _SPELLINGS.get(name_of(node) or "", ())
        if idle and is_float(node) and shape_of(node) and node not in written:
            kind, rest = _IDLE[idle.pop()]
            with graph.inserting_after(node):
                new = call(graph, kind, node, *rest(node), path=path_of(node))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        chosen = draw(st.integers(0, len(options))) if options and not node.kwargs else 0
        if not chosen:
            continue
        target, args, kwargs = options[chosen - 1](node.args)
        if isinstance(target, str) and not isinstance(args[0], fx.Node):
            continue  # a method of a plain number
        node.op = "call_method" if isinstance(target, str) else "call_function"
        node.target, node.args, node.kwargs = target, args, kwargs
    return replace(example, graph=graph)
