"""What a call does besides giving a result: what it writes, and whose memory its result shares.

Calls of the operator table are known by name. Graphs that Dynamo hands over hold others as well:
methods, Python's in-place operators, functions of torch that no pass looks for, and functions of
which nothing is known. Of the last, anything is possible: they may write every argument, share
memory with every argument, and change state that later calls depend on (autocast, grad mode).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .graph import dtype_of, name_of
from .operators import IN_PLACE

#: Operators of the table whose result may share memory with an argument.
VIEWS: frozenset[str] = frozenset(
    "view reshape transpose t permute unsqueeze squeeze expand expand_as getitem split chunk "
    "unbind unflatten flatten select narrow movedim swapaxes view_as contiguous to detach "
    "unfold type_as dropout einsum gather pos given last_tokens select_tokens "
    "track_gradient exact issue_gather wait_gather pack".split()
)

#: Of those, the ones that may share memory with any of their arguments, not with the first alone.
_OF_ANY = frozenset({"einsum", "given"})

_WRITING_OPERATORS = frozenset(
    getattr(operator, name)
    for name in "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor setitem".split()
)

#: Calls that only log, hint or check: they change nothing that others see.
QUIET: frozenset[str] = frozenset(
    {
        "_log_api_usage_once",
        "_assert_async",
        "_check",
        "_check_is_size",
        "sym_constrain_range",
        "_assert_tensor_metadata",
        "set_inplace_requires_grad_allowed",
    }
)

#: Public functions that write what their name does not tell: running means.
_HIDDEN = frozenset({"batch_norm", "instance_norm", "native_batch_norm", "rrelu"})

_OWNERS: tuple[Any, ...] = (torch, F, torch._C._nn, torch.special, torch.linalg, torch.fft)
_BUILTINS = (getattr, int, float, bool, max, min)


def is_quiet(node: fx.Node) -> bool:
    """Whether a call only logs, hints or checks."""
    return getattr(node.target, "__name__", "") in QUIET


def _is_public(target: Any) -> bool:
    """A function that torch or Python names in the open: known by the convention of its name."""
    name = getattr(target, "__name__", "_")
    if name.startswith(("_", "set_", "manual_")):
        return False
    if getattr(operator, name, None) is target or target in _BUILTINS:
        return True
    return any(getattr(owner, name, None) is target for owner in _OWNERS)


def is_opaque(node: fx.Node) -> bool:
    """Whether nothing is known about a call, so that anything must be assumed."""
    if node.op != "call_function":
        return node.op == "call_module"
    if name_of(node) is not None or is_quiet(node) or node.target in _WRITING_OPERATORS:
        return False
    return _mutable(node.target) is None and not _is_public(node.target)


def _mutable(target: Any) -> bool | None:
    """Whether a registered operator writes an argument; ``None`` where it is not registered."""
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
        return any(one._schema.is_mutable for one in overloads)
    return None


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory a call may write."""
    if node.op in ("placeholder", "output", "get_attr") or is_quiet(node):
        return []
    first = [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    if node.kwargs.get("out") is not None:
        return node.all_input_nodes
    if node.kwargs.get("inplace") is True or name_of(node) in IN_PLACE:
        return first
    if node.op == "call_method":
        return first if _ends_in_place(str(node.target)) else []
    if name_of(node) is not None:
        renorm = node.kwargs.get("max_norm", node.args[3] if len(node.args) > 3 else None)
        return node.all_input_nodes if name_of(node) == "embedding" and renorm else []
    if is_opaque(node):
        return node.all_input_nodes
    if _mutable(node.target) or getattr(node.target, "__name__", "") in _HIDDEN:
        return node.all_input_nodes
    written = node.target in _WRITING_OPERATORS
    return first if written or _ends_in_place(getattr(node.target, "__name__", "")) else []


def _ends_in_place(name: str) -> bool:
    """torch ends the names of what writes into its first argument in one underscore."""
    return name.endswith("_") and not name.endswith("__")


def shared_with(node: object) -> list[fx.Node]:
    """The arguments with which a call's result may share memory: views, and writes in place."""
    if not isinstance(node, fx.Node) or node.op in ("placeholder", "output", "get_attr"):
        return []
    name = name_of(node)
    if name in IN_PLACE or (name in VIEWS and name not in _OF_ANY):
        return [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    if name is not None and name not in VIEWS:
        return writes(node)
    return node.all_input_nodes


def shares_memory(node: object) -> bool:
    """Whether a call's result may share memory with an argument."""
    return bool(shared_with(node))


def bases(node: fx.Node) -> list[fx.Node]:
    """A value and all that it may be a view of."""
    found: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        source = todo.pop()
        if source not in found:
            found[source] = None
            todo += shared_with(source)
    return list(found)


def namesakes(node: fx.Node) -> list[fx.Node]:
    """Placeholders that may stand for the memory that ``node`` stands for.

    A caller may give one tensor as two inputs, a module may keep one as two buffers. Parameters
    are never written.
    """
    if node.op != "placeholder" or node.meta.get("parameter"):
        return []
    return [
        other
        for other in node.graph.nodes
        if other.op == "placeholder"
        and not other.meta.get("parameter")
        and ("input" in other.meta) == ("input" in node.meta)
        and dtype_of(other) == dtype_of(node)
    ]


def written_memory(graph: fx.Graph) -> set[fx.Node]:
    """Every value whose memory a call may write, under any of its names."""
    found: set[fx.Node] = set()
    todo = [base for node in graph.nodes for target in writes(node) for base in bases(target)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [user for user in node.users if node in shared_with(user)]
            todo += namesakes(node)
    return found
