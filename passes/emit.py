"""Write a graph as Python source, with each kind of decoder layer written once.

The nodes of a layer become a function whose text names no layer: its activations and tensors are
parameters. Layers with the same text share one function, which the root calls once for each with
that layer's tensors. The source holds assignments, calls of ``op.<operator>`` and of functions
defined above, ``del`` and ``return``; nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .effects import written_memory
from .graph import inside, is_pure, name_of, tail_names
from .operators import operator_name
from .writer import Writer, wrapped

#: Inputs of which each layer or attention has its own, numbered, and what its layer calls them.
_OF_A_LAYER = {
    "keys": "key_memory",
    "values": "value_memory",
    "implementations": "implementation",
    "shards": "next_shards",
}


@dataclass
class _Region:
    """The nodes of one layer, what they read from outside and what is read of them."""

    layer: str
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def _regions(graph: fx.Graph, layers: Sequence[str]) -> list[_Region]:
    """The nodes of each layer from which something is read outside of it."""
    found = []
    for layer in layers:
        nodes = [n for n in graph.nodes if n.op == "call_function" and inside(n, layer)]
        members = set(nodes)
        inputs = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in members)
        outputs = [n for n in nodes if any(user not in members for user in n.users)]
        if outputs:
            found.append(_Region(layer, nodes, list(inputs), outputs))
    return found


def _pull_inputs_up(graph: fx.Graph, regions: Sequence[_Region]) -> list[_Region]:
    """Move what a layer reads, but stands among its nodes, in front of it, where that is sound.

    What has an effect, or reads memory that is written in place, stays where it is.
    """
    kept = []
    written = written_memory(graph)
    for region in regions:
        place = {node: i for i, node in enumerate(graph.nodes)}
        first = region.nodes[0]
        members = set(region.nodes)
        strays = [s for s in region.inputs if place[s] > place[first]]
        todo, movable = list(strays), []
        sound = not _order_matters(graph, region, written)
        while todo:
            node = todo.pop()
            if node in members or node.op == "placeholder":
                sound = sound and node not in members
                continue
            if place[node] > place[first] and node not in movable:
                movable.append(node)
                todo += node.all_input_nodes
        if sound:
            for node in sorted(movable, key=place.__getitem__):
                first.prepend(node)
            kept.append(region)
    return kept


def _order_matters(graph: fx.Graph, region: _Region, written: set[fx.Node]) -> bool:
    """Whether a call that stands among a layer's nodes must keep its place between them."""
    members, last = set(region.nodes), region.nodes[-1]
    node = region.nodes[0]
    while node is not last:
        fixed = not is_pure(node) or written & {node, *node.all_input_nodes}
        if node not in members and node.op != "placeholder" and fixed:
            return True
        node = node.next
    return False


def _input_name(node: fx.Node, region: _Region, shared: set[fx.Node]) -> str:
    """What a layer function calls an input: by its place in the layer, never by its number."""
    if "prepared" in node.meta:
        return tail_names(str(node.meta["prepared_name"]), region.layer)
    if "weight" in node.meta:
        return tail_names(str(node.meta["weight"]), region.layer)
    if _is_memory(node):
        return _OF_A_LAYER[node.meta["input"].rpartition("_")[0]]
    if "input" in node.meta:
        return str(node.meta["input"])
    return node.name if node in shared else _flowing(node)


def _flowing(node: fx.Node) -> str:
    """What a value is called on its way from layer to layer."""
    return "pending" if name_of(node) == "issue_gather" else "hidden"


def _layer_function(
    region: _Region, shared: set[fx.Node], functions: frozenset[str], *, plain: bool
) -> tuple[str, list[fx.Node]]:
    """Parameters and body of a layer's function, and the nodes its arguments are.

    ``plain`` names values by operator, so that the text is equal for layers that are alike;
    otherwise they keep the names that capture gave them.
    """
    writer = Writer(functions=functions)
    own = [n for n in region.inputs if _is_own(n)]
    arguments = [*(n for n in region.inputs if n not in own), *own]
    for node in arguments:
        writer.name(node, _input_name(node, region, shared))
    parameters = ", ".join(writer.names[n] for n in arguments)
    members, results = set(region.nodes), set(region.outputs)
    remaining = {n: len([u for u in n.users if u in members]) for n in region.nodes}
    for node in region.nodes:
        text = writer.call(node)
        if node.users:
            wish = str(operator_name(node.target)) if plain else node.name
            text = f"{writer.name(node, wish)} = {text}"
        writer.lines.append(text)
        for source in node.all_input_nodes:
            if source in remaining:
                remaining[source] -= 1
        writer.forget(
            [s for s in node.all_input_nodes if s in members],
            lambda n: remaining[n] > 0 or n in results,
        )
    writer.lines.append("return " + ", ".join(writer.names[n] for n in region.outputs))
    return f"({parameters}):\n{writer.text()}", arguments


def _is_own(node: fx.Node) -> bool:
    """Whether an input belongs to one layer: its tensors and its KV memory."""
    return "prepared" in node.meta or "weight" in node.meta or _is_memory(node)


def _is_memory(node: fx.Node) -> bool:
    return str(node.meta.get("input", "")).rpartition("_")[0] in _OF_A_LAYER


def _argument(node: fx.Node) -> str | None:
    """How the root spells a placeholder."""
    if "prepared" in node.meta:
        return f"prepared[{node.meta['prepared']}]"
    if "weight" in node.meta:
        return f"weights[{node.meta['index']}]"
    name = str(node.meta.get("input", ""))
    if _is_memory(node):
        kind, _, number = name.rpartition("_")
        return f"{kind}[{number}]"
    return name or None


def emit(
    graph: fx.Graph,
    *,
    function: str,
    parameters: Sequence[str],
    layer_name: str,
    layers: Sequence[str],
) -> str:
    """The source of ``graph`` as ``def function(parameters)``, layer functions above it.

    Args:
        graph: A legal graph; placeholders carry ``prepared``, ``weight`` or ``input``.
        layer_name: What layer functions are called; a second kind gets a number.
        layers: Module paths of the layers, in order.
    """
    regions = _pull_inputs_up(graph, _regions(graph, layers))
    uses: dict[fx.Node, int] = {}
    for region in regions:
        for node in region.inputs:
            uses[node] = uses.get(node, 0) + 1
    produced = {node for region in regions for node in region.outputs}
    shared = {n for n, count in uses.items() if count == len(regions) > 1 and n not in produced}
    kinds: dict[str, str] = {}
    functions: list[str] = []
    names = frozenset(
        {function, layer_name, *(f"{layer_name}_{i + 1}" for i in range(1, len(regions)))}
    )
    heads: dict[fx.Node, tuple[_Region, str, list[fx.Node]]] = {}
    for region in regions:
        key, _ = _layer_function(region, shared, names, plain=True)
        text, arguments = _layer_function(region, shared, names, plain=False)
        if key not in kinds:
            kinds[key] = layer_name if not kinds else f"{layer_name}_{len(kinds) + 1}"
            functions.append(_definition(kinds[key], text))
        heads[region.nodes[0]] = (region, kinds[key], arguments)
    functions.append(
        _definition(function, f"({', '.join(parameters)}):\n{_root(graph, heads, names)}")
    )
    return "\n\n".join(functions)


def _definition(name: str, text: str) -> str:
    """``def name(parameters):`` and the body, the first line broken where it is long."""
    head, _, body = text.partition("\n")
    return f"{wrapped(f'def {name}{head}')}\n{body}"


def _root(
    graph: fx.Graph,
    heads: dict[fx.Node, tuple[_Region, str, list[fx.Node]]],
    functions: frozenset[str],
) -> str:
    writer = Writer(functions=functions)
    grouped = {n: region for region, *_ in heads.values() for n in region.nodes}
    remaining = {n: len(n.users) for n in graph.nodes}

    def finish(nodes: Sequence[fx.Node], sources: Sequence[fx.Node]) -> None:
        for node in nodes:
            for source in node.all_input_nodes:
                remaining[source] -= 1
        named = [s for s in sources if s.op != "placeholder" and s in writer.names]
        writer.forget(named, lambda n: remaining[n] > 0)

    for node in graph.nodes:
        if node.op == "placeholder":
            writer.names[node] = _argument(node) or node.name
            writer.taken.add(writer.names[node])
        elif node.op == "output":
            if node.args[0] is not None:
                writer.lines.append(f"return {writer.spell(node.args[0])}")
        elif node in heads:
            region, name, arguments = heads[node]
            given = ", ".join(writer.names[n] for n in arguments)
            flowing = [_flowing(n) for n in region.outputs]
            alone = len(set(flowing)) == len(flowing)
            wishes = flowing if alone else [n.name for n in region.outputs]
            targets = [writer.name(*pair) for pair in zip(region.outputs, wishes, strict=True)]
            writer.lines.append(f"{', '.join(targets)} = {name}({given})")
            finish(region.nodes, region.inputs)
        elif node not in grouped:
            text = writer.call(node)
            if node.users:
                text = f"{writer.name(node, node.name)} = {text}"
            writer.lines.append(text)
            finish([node], node.all_input_nodes)
    return writer.text()
