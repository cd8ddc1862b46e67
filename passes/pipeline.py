"""The pipeline, as it is read: from the canonical graph to the stages of a plan."""

from __future__ import annotations

from torch import fx

from .canonicalize import canonicalize
from .concat import concat_gate_up, concat_qkv
from .fold_lora import fold_lora
from .fuse_mlp import fuse_mlp
from .fuse_norm import fuse_add_norm, fuse_rms_norm
from .gather import gather_weights
from .last_tokens import keep_last_tokens
from .rewrite import Pass
from .thread_kv import thread_kv_decode, thread_kv_prefill

#: Brings any captured graph into the one spelling that all other passes expect.
NORMALIZE: tuple[tuple[str, Pass], ...] = (("canonicalize", canonicalize),)

#: Rewrites layers, by policy; each may be left out.
OPTIONAL: tuple[tuple[str, Pass], ...] = (
    ("fuse_rms_norm", fuse_rms_norm),
    ("fold_lora", fold_lora),
    ("concat_qkv", concat_qkv),
    ("concat_gate_up", concat_gate_up),
    ("fuse_mlp", fuse_mlp),
    ("fuse_add_norm", fuse_add_norm),
)

#: Puts a gather behind every weight; hoisting follows it.
STAGE: tuple[tuple[str, Pass], ...] = (("gather_weights", gather_weights),)

#: What makes the body a prefill and a decode graph.
PREFILL: tuple[tuple[str, Pass], ...] = (
    ("thread_kv_prefill", thread_kv_prefill),
    ("keep_last_tokens", keep_last_tokens),
)
DECODE: tuple[tuple[str, Pass], ...] = (
    ("thread_kv_decode", thread_kv_decode),
    ("keep_last_tokens", keep_last_tokens),
)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes; fake values are shared, not copied."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, lambda n: copies[n])
    return new
