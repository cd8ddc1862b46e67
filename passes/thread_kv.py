"""Thread the KV workspace through attention: the captured graph becomes prefill or decode.

Needs no policy: every ``attention`` becomes ``attend`` (any number of new tokens) or
``attend_one`` (one new token a row), with one key and one value memory for each. Rows are
addressed by tensors, never by a layer index or a position constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .contract import Context, Pass, PassResult
from .graph import call, calls, dtype_of, fresh_input, path_of, shape_of
from .pattern import NoMatch

#: Of the attention op: window, softcap, sinks, dropout.
_DEFAULTS = (0, 0.0, None, 0.0)


@dataclass(frozen=True)
class KVShape:
    """What one attention needs of the workspace: K heads, the sizes of keys and values."""

    path: str
    heads: int
    key_size: int
    value_size: int
    window: int
    dtype: torch.dtype


def kv_shapes(graph: fx.Graph) -> tuple[KVShape, ...]:
    """The memory each attention of a captured graph needs, in order."""
    return tuple(map(_kv_shape, calls(graph, "attention")))


def _kv_shape(node: fx.Node) -> KVShape:
    key, value, dtype = shape_of(node.args[1]), shape_of(node.args[2]), dtype_of(node.args[1])
    assert key is not None
    assert value is not None
    assert dtype is not None
    window = node.args[4] if len(node.args) > 4 else 0
    return KVShape(path_of(node), int(key[1]), int(key[3]), int(value[3]), window, dtype)


def _thread(graph: fx.Graph, operator: str) -> PassResult:
    count, misses = 0, []
    for index, node in enumerate(calls(graph, "attention")):
        query, key, value, scale = node.args[:4]
        rest = node.args[4:]
        options: tuple[Any, ...] = (*rest, *_DEFAULTS[len(rest) :])
        window, softcap, sinks, dropout = options
        if dropout:
            misses.append((path_of(node), NoMatch(node.name, "attention without dropout", "some")))
            continue
        memory = (fresh_input(graph, f"keys_{index}"), fresh_input(graph, f"values_{index}"))
        table = tuple(fresh_input(graph, name) for name in ("slots", "key_valid", "pitch"))
        with graph.inserting_before(node):
            new = call(
                graph,
                operator,
                query,
                key,
                value,
                *memory,
                *table,
                scale,
                window,
                softcap,
                sinks,
                path=path_of(node),
            )
        new.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    return PassResult(count, tuple(misses))


def thread_kv_prefill(graph: fx.Graph, context: Context) -> PassResult:
    """Attention over the workspace for any number of new tokens a row."""
    return _thread(graph, "attend")


def thread_kv_decode(graph: fx.Graph, context: Context) -> PassResult:
    """Attention over the workspace for one new token a row."""
    return _thread(graph, "attend_one")


_INPUTS = frozenset({"keys", "values", "slots", "key_valid", "pitch"})

THREAD_KV_PREFILL = Pass(
    "thread_kv_prefill",
    thread_kv_prefill,
    provides=frozenset({"threaded"}),
    conflicts=frozenset({"threaded", "masks_threaded"}),
    may_add=frozenset({"attend"}),
    inputs=_INPUTS,
)
THREAD_KV_DECODE = Pass(
    "thread_kv_decode",
    thread_kv_decode,
    provides=frozenset({"threaded"}),
    conflicts=frozenset({"threaded", "masks_threaded"}),
    may_add=frozenset({"attend_one"}),
    inputs=_INPUTS,
)
