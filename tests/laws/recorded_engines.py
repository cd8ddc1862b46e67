"""Engines that record their decode steps, what they recorded, and a pass that is not recorded."""

from __future__ import annotations

from typing import Any

from tiny_models import tiny
from torch import fx, nn

import hybrid_fx
from hybrid_fx.passes import Context, Pass, PassResult
from hybrid_fx.passes.graph import call, calls, path_of
from hybrid_fx.runtime import recorded

ENDS = list(range(5, 20))

GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}


def engine_of(model: nn.Module, **options: Any) -> Any:
    return hybrid_fx.hybridize(model, graph="cudagraphs", **options)


def steps_of(engine: Any) -> recorded.RecordedDecode:
    steps: recorded.RecordedDecode = engine._graphs.runner.recorded
    return steps


def sizes_of(engine: Any) -> list[tuple[int, int]]:
    """Rows and columns of the recordings there are, the latest last."""
    assert not steps_of(engine).failure
    return [(inputs.rows, inputs.columns) for inputs, _ in steps_of(engine)._kept.values()]


def family(kind: str) -> Any:
    """A tiny model of :data:`KINDS`, or with a softcap and windows in every second layer."""
    if kind != "gemma2":
        return tiny(kind)
    return tiny(kind, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)


def _looks(graph: fx.Graph, context: Context) -> PassResult:
    """Adds nothing, by way of a number that the host reads."""
    count = 0
    for node in calls(graph, "linear"):
        if path_of(node).endswith("o_proj"):
            with graph.inserting_after(node):
                largest = call(graph, "amax", node, path=path_of(node))
            with graph.inserting_after(largest):
                number = call(graph, "item", largest, path=path_of(node))
            with graph.inserting_after(number):
                nothing = call(graph, "mul", number, 0.0, path=path_of(node))
            with graph.inserting_after(nothing):
                new = call(graph, "add", node, nothing, path=path_of(node))
            new.meta["val"] = node.meta.get("val")
            node.replace_all_uses_with(new, delete_user_cb=lambda u, m=(largest, new): u not in m)
            count += 1
    return PassResult(count)


LOOKS = Pass("looks", _looks, may_add=frozenset({"amax", "item", "mul", "add"}), exact=True)
