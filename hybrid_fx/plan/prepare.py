"""The source of a prepare graph: layer by layer, each followed by the stores of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from ..passes.emit import emit
from ..passes.fold_lora import FOLDS, site_of
from ..passes.graph import after, calls, inside, name_of, path_of, value_of
from ..passes.hoist import Hoisted
from ..passes.operators import OPERATORS
from ..passes.pipeline import copy_graph


class _Stored(NamedTuple):
    """One result: the operator that hands it over, and the nodes that it is given as."""

    operator: str
    nodes: tuple[fx.Node, ...]


def prepare_source(staged: Hoisted, layers: Sequence[str]) -> tuple[str, list[str]]:
    """The prepare graph as source, and the sites of its folds.

    Where there are some, it stores the error of each beside its results; and a second function
    stores the errors alone. What is packed is stored as the weights that it stacks, so that they
    can be laid out where their packed form lies already.

    Args:
        layers: Module paths of the layers, in order.
    """
    graph = copy_graph(staged.prepare)
    folds = calls(graph, *FOLDS)
    sites = [site_of(path_of(fold)) for fold in folds]
    errors = [_Stored("store", (_measured(graph, fold),)) for fold in folds]
    output = next(n for n in graph.nodes if n.op == "output")
    assert isinstance(output.args[0], tuple)
    results = [_stored(node) for node in output.args[0]]

    def source(function: str, outputs: Mapping[str, Sequence[_Stored]]) -> str:
        output.args = (
            tuple(node for all in outputs.values() for one in all for node in one.nodes),
        )
        _drop_unused(graph)
        return emit(
            _by_layer(graph, layers, outputs),
            function=function,
            parameters=("weights", *outputs),
            layer_name=f"{function}_layer",
            layers=layers,
        )

    if not folds:
        return source("prepare", {"prepared": results}), []
    prepare = source("prepare", {"prepared": results, "errors": errors})
    return prepare + "\n\n" + source("measure", {"errors": errors}), sites


def _stored(result: Any) -> _Stored:
    if name_of(result) != "pack":
        return _Stored("store", (result,))
    weight: Any = result.args[0]
    stacked = name_of(weight) == "concat_rows" and len(weight.users) == 1
    return _Stored("store_packed", weight.args if stacked else (weight,))


def _by_layer(
    graph: fx.Graph, layers: Sequence[str], outputs: Mapping[str, Sequence[_Stored]]
) -> fx.Graph:
    """A copy in which each layer's nodes stand together, followed by the stores of its results.

    Args:
        outputs: What is stored where: the name of a parameter of the source to nodes of ``graph``.
    """
    groups: list[list[fx.Node]] = [[] for _ in range(len(layers) + 1)]
    group_of: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            own = next((i + 1 for i, path in enumerate(layers) if inside(node, path)), 0)
            # what reads another group's result cannot stand before it
            group_of[node] = max(own, *(group_of.get(s, 0) for s in node.all_input_nodes), 0)
            groups[group_of[node]].append(node)
    new, copies = fx.Graph(), {}
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = new.node_copy(node)
    targets = {name: new.placeholder(name) for name in outputs}
    for name, target in targets.items():
        target.meta |= {"path": "", "input": name}
    for number, group in enumerate(groups):
        for node in group:
            copies[node] = new.node_copy(node, lambda n: copies[n])
        for name, results in outputs.items():
            for index, (operator, nodes) in enumerate(results):
                if max(group_of.get(node, 0) for node in nodes) == number:
                    arguments = (targets[name], index, *(copies[node] for node in nodes))
                    stored = new.call_function(OPERATORS[operator], arguments)
                    stored.meta["path"] = ""
    new.output(None)
    return new


def _measured(graph: fx.Graph, fold: fx.Node) -> fx.Node:
    """Put a fold that measures in the place of one; its error, which is what rounding takes."""
    measure = OPERATORS[str(name_of(fold)).replace("fold", "measured")]
    with after(graph, fold):
        both = graph.call_function(measure, fold.args)
        folded, error = (
            graph.create_node("call_function", OPERATORS["getitem"], (both, place), name=name)
            for place, name in enumerate(("folded", "error"))
        )
    for node in (both, folded, error):
        node.meta["path"] = path_of(fold)
    folded.meta["val"] = value_of(fold)
    fold.replace_all_uses_with(folded)
    graph.erase_node(fold)
    return error


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
