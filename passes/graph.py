"""What every pass needs of an ``fx.Graph``: names, places, values, and building new nodes.

The graphs here hold placeholders, ``call_function`` nodes of the operator table, and one output.
Six entries of ``node.meta`` carry what passes look at:

* ``path``: the qualified name of the module the node stands in ("" at the root),
* ``val``: a fake tensor (or symbolic size) that tells shape and dtype,
* ``weight`` on a placeholder: the qualified name of the parameter or buffer it stands for,
* ``input`` on a placeholder: the name of the runtime input it stands for,
* ``prepared`` on a placeholder: the number of the prepared tensor it stands for,
* ``stack`` on a linear: the roles whose weights it stacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .operators import EFFECTS, INPLACE_AT, OPERATORS, operator_name


def name_of(node: object) -> str | None:
    """The operator a node calls, or ``None`` for placeholders, the output and plain values."""
    if isinstance(node, fx.Node) and node.op == "call_function":
        return operator_name(node.target)
    return None


def path_of(node: fx.Node) -> str:
    """The qualified name of the module a node stands in."""
    path: str = node.meta.get("path", "")
    return path


def owner_of(nodes: Iterable[fx.Node]) -> str:
    """The innermost module in which all of ``nodes`` stand."""
    common: list[str] = []
    for parts in zip(*(path_of(node).split(".") for node in nodes), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def inside(node: fx.Node, prefix: str) -> bool:
    """Whether a node stands in the module ``prefix`` or below it."""
    path = path_of(node)
    return not prefix or path == prefix or path.startswith(prefix + ".")


def value_of(node: object) -> Any:
    """The fake value a node was recorded with; other arguments stand for themselves."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def shape_of(node: object) -> tuple[Any, ...] | None:
    """The shape of a node's value, symbolic where dynamic; ``None`` where unknown."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for certain; unlike ``==``, it asks nothing of symbolic ones.

    A question about a symbolic size would become a guard of the graph that Dynamo compiles.
    """
    if isinstance(a, int) or isinstance(b, int):  # a symbol may have been taken for a number
        return isinstance(a, int) and isinstance(b, int) and a == b
    return str(a) == str(b)


def same_shape(a: Sequence[Any] | None, b: Sequence[Any] | None) -> bool:
    """Whether two shapes are known and equal for certain."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(map(same_size, a, b))


def dtype_of(node: object) -> torch.dtype | None:
    """The dtype of a node's value; ``None`` where it is no tensor or unknown."""
    value = value_of(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def weight_name(node: object) -> str | None:
    """The parameter or buffer a placeholder stands for."""
    return node.meta.get("weight") if isinstance(node, fx.Node) else None


def calls(graph: fx.Graph, *names: str) -> list[fx.Node]:
    """All nodes that call one of the named operators, in order."""
    return [node for node in graph.nodes if name_of(node) in names]


#: Operators that draw random numbers: the place and name of their rate, and of what turns it off.
_RANDOM = {
    "dropout": ((1, "p", 0.5), (2, "training", True)),
    "attention": ((7, "dropout", 0.0), None),
    "scaled_dot_product_attention": ((4, "dropout_p", 0.0), None),
}


def draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers: it keeps its place among others that do."""
    rate, switch = _RANDOM.get(name_of(node) or "", (None, None))
    return rate is not None and bool(_given(node, *rate) and (not switch or _given(node, *switch)))


def _given(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def is_pure(node: fx.Node) -> bool:
    """Whether a node may be moved, merged or dropped; what the table lacks may not."""
    if node.op == "call_method":  # as captured: torch ends the names of methods that write in _
        return not str(node.target).endswith("_")
    name = name_of(node)
    if name is None or name in EFFECTS or draws(node):
        return False
    at = INPLACE_AT.get(name, len(node.args))
    return not (node.args[at : at + 1] == (True,) or node.kwargs.keys() & {"inplace", "out"})


def sweep(graph: fx.Graph) -> int:
    """Drop pure nodes that nothing uses, last first; returns how many."""
    count = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node):
            graph.erase_node(node)
            count += 1
    return count


@contextlib.contextmanager
def after(graph: fx.Graph, node: fx.Node) -> Iterator[None]:
    """Insert new nodes behind ``node``, in the order they are made; never among placeholders."""
    if node.op == "placeholder":
        node = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_before(node.next):
        yield


def call(graph: fx.Graph, operator: str, *args: Any, path: str, **kwargs: Any) -> fx.Node:
    """Add a call of ``operator`` at the insert point, with its fake value computed."""
    node = graph.call_function(OPERATORS[operator], args, kwargs)
    node.meta["path"] = path
    node.meta["val"] = evaluate(node)
    return node


@contextlib.contextmanager
def fake_values(mode: FakeTensorMode) -> Iterator[None]:
    """Compute on fake tensors of ``mode``, without gradients."""
    # As Dynamo does it: torch 2.11 asks matmul for its number of elements otherwise, which a
    # symbolic size does not have. Tried on torch 2.11 and 2.13.
    with mode, enable_python_dispatcher(), torch.no_grad():
        yield


def evaluate(node: fx.Node) -> Any:
    """The fake value of a node from those of its arguments; ``None`` where one is unknown."""
    known = all(value_of(arg) is not None for arg in node.all_input_nodes)
    values = [value_of(arg) for arg in node.all_input_nodes]
    flat = [v for value in values for v in (value if isinstance(value, tuple | list) else (value,))]
    mode = next((value.fake_mode for value in flat if isinstance(value, FakeTensor)), None)
    if not known or mode is None or operator_name(node.target) in EFFECTS:
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    with fake_values(mode):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def fresh_input(graph: fx.Graph, name: str, val: Any = None) -> fx.Node:
    """The placeholder of a runtime input, added behind the last placeholder where missing."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if node.meta.get("input") == name:
            return node
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder(name)
    node.meta |= {"path": "", "val": val, "input": name}
    return node


def order(graph: fx.Graph) -> dict[fx.Node, int]:
    """Each node's place in the graph."""
    return {node: index for index, node in enumerate(graph.nodes)}


def tail_names(path: str, prefix: str) -> str:
    """``path`` as seen from inside ``prefix``."""
    return path[len(prefix) + 1 :] if prefix and path.startswith(prefix + ".") else path
