"""The pipeline, as it is read: from the canonical graph to the stages of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import fx

from .canonicalize import CANONICALIZE
from .concat import CONCAT_GATE_UP, CONCAT_QKV
from .contract import Pass, Pipeline
from .fold_lora import FOLD_LORA
from .fuse_mlp import FUSE_MLP
from .fuse_norm import FUSE_ADD_NORM, FUSE_RMS_NORM
from .gather import GATHER_WEIGHTS
from .last_tokens import KEEP_LAST_TOKENS, KEEP_SELECTED_TOKENS
from .pack_weights import PACK_WEIGHTS
from .shard_tp import SHARD_TP
from .stream import STREAM_GATHERS
from .take_embeds import TAKE_EMBEDS
from .thread_kv import THREAD_KV_DECODE, THREAD_KV_PREFILL
from .thread_masks import THREAD_MASKS

_CANONICAL = frozenset({"canonical"})

#: Brings any captured graph into the one spelling that all other passes expect.
NORMALIZE = Pipeline((CANONICALIZE,))

#: Rewrites layers, by policy; each may be left out.
OPTIONAL = Pipeline(
    (FUSE_RMS_NORM, FOLD_LORA, SHARD_TP, CONCAT_QKV, CONCAT_GATE_UP, FUSE_MLP, FUSE_ADD_NORM),
    given=_CANONICAL,
)

#: Lays weights out for the device; behind the other passes over layers, which look for a linear.
PACK = Pipeline((PACK_WEIGHTS,), given=_CANONICAL)

#: Puts a gather behind every weight; hoisting follows it.
STAGE = Pipeline((GATHER_WEIGHTS,), given=_CANONICAL)

#: Lets the layers gather their own weights while they run, where not all fit at once.
STREAM = Pipeline((STREAM_GATHERS,), given=_CANONICAL | {"gathered"})

#: Names of the passes that make new weights of a layer's, which pays where that happens once.
NEW_WEIGHTS = frozenset({"fold_lora", "concat_qkv", "concat_gate_up", "pack_weights"})

#: What makes the body a prefill and a decode graph.
PREFILL = Pipeline((THREAD_KV_PREFILL, KEEP_LAST_TOKENS, TAKE_EMBEDS), given=_CANONICAL)
DECODE = Pipeline((THREAD_KV_DECODE, KEEP_LAST_TOKENS), given=_CANONICAL)

#: What makes a canonical graph, captured for training, one that trains as its model does.
TRAIN = Pipeline((THREAD_MASKS, KEEP_SELECTED_TOKENS), given=_CANONICAL)

_PARTS = (NORMALIZE, OPTIONAL, PACK, STAGE, STREAM, PREFILL, DECODE, TRAIN)

#: Every pass of the library by its name.
PASSES: Mapping[str, Pass] = MappingProxyType({one.name: one for part in _PARTS for one in part})


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes; fake values are shared, not copied."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, lambda n: copies[n])
    return new
