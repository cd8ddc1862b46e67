"""Every weight reaches the graph through a ``gather`` node.

On one process a gather hands the parameter through; under sharding it is where the parameter is
made whole. Hoisting then moves it, with all that depends on weights only, into the prepare graph.
"""

from __future__ import annotations

from torch import fx

from .contract import Context, Pass, PassResult
from .graph import after, call, name_of


def gather_weights(graph: fx.Graph, context: Context) -> PassResult:
    """Put a gather behind each weight placeholder that has none."""
    count = 0
    weights = [n for n in graph.nodes if n.op == "placeholder" and "weight" in n.meta]
    for node in reversed(weights):
        if any(name_of(user) == "gather" for user in node.users):
            continue
        with after(graph, node):
            whole = call(graph, "gather", node, path=node.meta["weight"].rpartition(".")[0])
        for user in list(node.users):
            if user is not whole:
                user.replace_input_with(node, whole)
        count += 1
    return PassResult(count)


GATHER_WEIGHTS = Pass(
    "gather_weights",
    gather_weights,
    provides=frozenset({"gathered"}),
    may_add=frozenset({"gather"}),
    exact=True,
    modes=frozenset({"inference", "training"}),
)
