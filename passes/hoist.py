"""Stage by binding time: move all that depends on weights only into the prepare graph.

Nobody decides by hand where a gather, a fold or a stacked weight goes. A node moves when it is
pure and every value it reads is a weight or was moved; a weight that the graph itself writes
(a buffer updated in place) keeps its readers where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .binding import tensors_cross, weight_only
from .effects import VIEWS
from .graph import dtype_of, name_of, path_of, sweep, value_of


@dataclass(frozen=True)
class Hoisted:
    """A graph in two stages.

    Attributes:
        prepare: Weights in; its output is the tuple of prepared tensors.
        body: The rest; prepared tensors come in as placeholders with ``meta["prepared"]``.
        names: Of the prepared tensors, in order.
        recipes: The expression behind each, for people.
        owned: Whether each has memory of its own; else it is a weight or a view of one.
    """

    prepare: fx.Graph
    body: fx.Graph
    names: tuple[str, ...]
    recipes: tuple[str, ...]
    owned: tuple[bool, ...]


def recipe(node: fx.Node) -> str:
    """The expression of a hoisted node over weight names."""
    if node.op == "placeholder":
        return str(node.meta.get("weight", node.name))
    if name_of(node) in ("gather", "pack"):  # the same values, elsewhere or laid out otherwise
        return recipe(node.args[0])  # type: ignore[arg-type]

    def show(value: object) -> str:
        return recipe(value) if isinstance(value, fx.Node) else repr(value)

    return f"{name_of(node)}({', '.join(show(arg) for arg in node.args)})"


def _owned(node: fx.Node) -> bool:
    """Whether a hoisted value has memory of its own, but for what packing made."""
    while name_of(node) in VIEWS:
        source = node.args[0]
        if not isinstance(source, fx.Node) or dtype_of(node) != dtype_of(source):
            break  # a cast, or a list: a copy
        value = value_of(source)
        if name_of(node) == "contiguous" and value is not None and not value.is_contiguous():
            break
        node = source
    return node.op != "placeholder"


def _name(node: fx.Node, taken: set[str]) -> str:
    if name_of(node) == "gather" and node.args[0].op == "placeholder":  # type: ignore[union-attr]
        base = str(node.args[0].meta["weight"])  # type: ignore[union-attr]
    else:
        base = f"{path_of(node)}.{name_of(node)}".lstrip(".")
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name


def hoist(graph: fx.Graph) -> Hoisted:
    """Split ``graph`` (which becomes the body) at the edge between weights and tokens."""
    movable = tensors_cross(weight_only(graph))
    crossing = [node for node in movable if any(user not in movable for user in node.users)]
    prepare = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in movable:
        copies[node] = prepare.node_copy(node, lambda n: copies[n])
    prepare.output(tuple(copies[node] for node in crossing))
    names: list[str] = []
    taken: set[str] = set()
    recipes = tuple(recipe(node) for node in crossing)
    owned = tuple(_owned(node) for node in crossing)
    last = next(node for node in graph.nodes if node.op != "placeholder")
    for index, node in enumerate(crossing):
        names.append(_name(node, taken))
        with graph.inserting_before(last):
            stand_in = graph.placeholder(f"prepared_{index}")
        stand_in.meta |= {"path": path_of(node), "val": value_of(node), "prepared": index}
        stand_in.meta["prepared_name"] = names[-1]
        node.replace_all_uses_with(stand_in, delete_user_cb=lambda user: user not in movable)
    sweep(graph)
    for node in movable:
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    sweep(prepare)
    return Hoisted(prepare, graph, tuple(names), recipes, owned)
