"""Weights of linear layers are packed: laid out for the kernel that multiplies with them.

A packed weight depends on parameters only, so that hoisting moves the packing into the prepare
graph. A weight that several layers read is packed once; what reads it otherwise (an embedding
tied to the head) keeps the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import fx

from .binding import weight_only
from .contract import Context, Pass, PassResult
from .effects import written_memory
from .graph import after, call, name_of, path_of, shape_of
from .operators import OPERATORS

#: Where the operators that multiply with weights take them.
WEIGHTS_AT: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "linear": (1,),
        "gated_mlp": (1, 3),
        "split_gated_mlp": (1, 3, 5),
        "plain_mlp": (1, 3),
    }
)


def pack_weights(graph: fx.Graph, context: Context) -> PassResult:
    """Let every product of tokens with a weight [F, E] read a packed one."""
    fixed, written = weight_only(graph), written_memory(graph)
    packed: dict[fx.Node, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node in fixed:
            continue
        changed = False
        for place in WEIGHTS_AT.get(name_of(node) or "", ()):
            weight = node.args[place]
            if not _may_pack(weight, fixed, written):
                continue
            assert isinstance(weight, fx.Node)
            if weight not in packed:
                packed[weight] = _packed(graph, weight)
            node.update_arg(place, packed[weight])
            changed = True
        if changed and name_of(node) == "linear":
            node.target = OPERATORS["packed_linear"]
        count += changed
    return PassResult(count)


def _may_pack(weight: object, fixed: Mapping[fx.Node, None], written: set[fx.Node]) -> bool:
    if not isinstance(weight, fx.Node) or weight not in fixed or weight in written:
        return False
    shape = shape_of(weight)
    return name_of(weight) != "pack" and shape is not None and len(shape) == 2


def _packed(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """The packed form of a weight, as soon as that is there."""
    own = weight.meta.get("weight")
    path = path_of(weight) if own is None else str(own).rpartition(".")[0]
    with after(graph, weight):
        return call(graph, "pack", weight, path=path)


PACK_WEIGHTS = Pass(
    "pack_weights",
    pack_weights,
    provides=frozenset({"packed"}),
    may_add=frozenset({"pack", "packed_linear"}),
)
