"""Thread masks through attention: the captured graph becomes one that trains as its model does.

Every ``attention`` becomes ``attend_as_configured``, with the implementation of its module and
the mask of its kind as inputs. Masks are built once a forward, beside the graph, by whoever runs
it; attention with a window is given one kind of mask, and all others are given the other.
"""

from __future__ import annotations

from torch import fx

from .contract import Context, Pass, PassResult
from .graph import call, calls, fresh_input, path_of

#: The inputs that masks come in by: for attention without a window, and with one.
MASKS = ("causal_mask", "window_mask")


def thread_masks(graph: fx.Graph, context: Context) -> PassResult:
    """Attention by the implementation that each module was configured with."""
    nodes = calls(graph, "attention")
    for index, node in enumerate(nodes):
        query, key, value, *options = node.args
        windowed = len(node.args) > 4 and bool(node.args[4])
        implementation = fresh_input(graph, f"implementations_{index}")
        mask = fresh_input(graph, MASKS[windowed])
        with graph.inserting_before(node):
            new = call(
                graph,
                "attend_as_configured",
                implementation,
                query,
                key,
                value,
                mask,
                *options,
                path=path_of(node),
            )
        new.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return PassResult(len(nodes))


THREAD_MASKS = Pass(
    "thread_masks",
    thread_masks,
    provides=frozenset({"masks_threaded"}),
    conflicts=frozenset({"masks_threaded", "threaded"}),
    may_add=frozenset({"attend_as_configured"}),
    exact=True,
    modes=frozenset({"training"}),
    inputs=frozenset({"implementations", *MASKS}),
)
