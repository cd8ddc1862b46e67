"""A bound on the nodes that one pass creates, so that a pass that loops ends.

``fx.GraphModule`` has hooks for new nodes; a graph of its own has none, so ``create_node`` of the
one graph is stood in for while the pass runs. A loop that creates no node is not stopped: rules
over pure operators end by themselves, as each match leaves a node unused that is swept away, and a
graph is not told of a loop in Python that moves arguments about or does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import fx

from .contract import PassError
from .show import line

#: A pass may create this many nodes for each one that it finds, and as many besides.
PER_NODE, BESIDES = 10, 1000


@contextlib.contextmanager
def bounded(graph: fx.Graph, name: str) -> Iterator[None]:
    """Stop the pass ``name`` at the first node beyond the bound.

    Raises:
        PassError: naming the pass, the count and the last node.
    """
    size = len(graph.nodes)
    limit, created = PER_NODE * size + BESIDES, 0
    create = graph.create_node

    def counted(*args: Any, **kwargs: Any) -> fx.Node:
        nonlocal created
        node = create(*args, **kwargs)
        created += 1
        if created > limit:
            raise PassError(
                f"pass {name} was stopped: it created {created} nodes in a graph of {size} "
                f"(the limit is {limit}), the last of them {line(node)}. Where a rule matches "
                "what it builds, let it decline there"
            )
        return node

    vars(graph)["create_node"] = counted
    try:
        yield
    finally:
        del vars(graph)["create_node"]
