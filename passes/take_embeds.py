"""Let embeddings stand in for token ids: a prefill graph takes either.

A caller's embeddings take the place of what the module that looks ids up gives, as
``inputs_embeds`` does in transformers. That module is found by what it does: every lookup by
token ids stands in it (a LoRA branch looks up too), and one value leaves it.
"""

from __future__ import annotations

import torch
from torch import fx

from .contract import Context, Pass, PassResult
from .graph import after, call, calls, fresh_input, inside, name_of, owner_of, path_of, value_of
from .layers import ATTENTION
from .pattern import NoMatch

#: Reads of the ids that see their shape alone.
_SHAPE = ("size", "dim")


def _derived(source: fx.Node) -> dict[fx.Node, None]:
    """All values computed from ``source``, in order; its shape is not a value."""
    found = {source: None}
    for node in source.graph.nodes:
        if name_of(node) not in _SHAPE and any(s in found for s in node.all_input_nodes):
            found[node] = None
    return found


def _looked_up(ids: fx.Node) -> fx.Node | NoMatch:
    """The one value that leaves the module that looks ``ids`` up."""
    graph = ids.graph
    lookups = [node for node in calls(graph, "embedding") if node.args[0] is ids]
    owner = owner_of(lookups)
    if not owner or any(inside(node, owner) for node in calls(graph, *ATTENTION)):
        where = ", ".join(sorted({path_of(node) for node in lookups})) or "nowhere"
        return NoMatch(ids.name, "one module that looks token ids up", f"lookups in {where}")
    values = _derived(ids)
    within = [node for node in values if node is not ids and inside(node, owner)]
    leaving = [node for node in within if any(not inside(u, owner) for u in node.users)]
    astray = [u for u in ids.users if name_of(u) not in _SHAPE and not inside(u, owner)]
    if len(leaving) != 1 or astray:
        others = ", ".join(node.name for node in (astray or leaving))
        return NoMatch(ids.name, f"one value of the ids, from {owner}", f"also {others}")
    return leaving[0]


def take_embeds(graph: fx.Graph, context: Context) -> PassResult:
    """Add the runtime input ``embeds`` [B, T, E] or ``None``; with it the ids give a shape only."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    ids = next((node for node in inputs if node.meta.get("input") == "input_ids"), None)
    if ids is None or any(node.meta.get("input") == "embeds" for node in inputs):
        return PassResult(0)
    found = _looked_up(ids)
    if isinstance(found, NoMatch):
        return PassResult(0, (("", found),))
    embeds = fresh_input(graph, "embeds")
    with after(graph, found):
        new = call(graph, "given", embeds, found, path=path_of(found))
    new.meta["val"] = value_of(found)
    assert isinstance(new.meta["val"], torch.Tensor)
    found.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return PassResult(1)


TAKE_EMBEDS = Pass(
    "take_embeds",
    take_embeds,
    provides=frozenset({"takes_embeds"}),
    may_add=frozenset({"given"}),
    exact=True,
    inputs=frozenset({"embeds"}),
)
