"""Merge LoRA branches into the weight they stand beside, as nodes that hoisting moves to prepare.

``linear(x, W, b) + s * linear(linear(x, A), B)`` becomes ``linear(x, fold_lora(W, A, B, s), b)``.
PEFT writes it so; ``(x @ R @ L) * s`` of DeepSpeed-Chat is the same in canonical spelling.
Several adapters fold at once, so that the sum is rounded once. DoRA (Liu et al. 2024) scales the
rows of the sum; adapters on embeddings fold into the table. Base weights are read, never written.
A site whose suffix is in ``context.side`` stays a branch.
"""

from __future__ import annotations

import re
from typing import Any as Value

from torch import fx

from .binding import weight_only, weights_first
from .contract import Context, Pass, PassResult
from .effects import written_memory
from .graph import (
    call,
    calls,
    dtype_of,
    name_of,
    path_of,
    same_size,
    shape_of,
    sweep,
    tail_names,
    weight_name,
)
from .layers import layer_of
from .pattern import Any, Call, Const, Either, Match, NoMatch, Opt, Pattern, match
from .rewrite import reads_written, safe_to_replace

#: The operators that fold an adapter into a weight.
FOLDS = ("fold_lora", "fold_dora")

_X = Opt("to", Any("x", node=True))
_NONE = Const(equals=None)
_LOW_RANK = Call("linear", Call("linear", _X, Any("a", node=True), _NONE), Any("b"), _NONE)
_SCALE = Const("scale", (int, float))
_BRANCH = Either(Call("mul", _LOW_RANK, _SCALE, commutes=True), _LOW_RANK)
_TABLE_A = Call("embedding", Any("x", node=True), Any("a", node=True))
_LOOKUP = Call("linear", _TABLE_A, Any("b", node=True), _NONE)
_LOOKUP_BRANCH = Either(Call("mul", _LOOKUP, _SCALE, commutes=True), _LOOKUP)

_BASE = Call("linear", Any("x", node=True), Any("weight"), Any("bias"), name="base")
_TABLE = Call("embedding", Any("x", node=True), Any("weight"), name="base")
_INNER = Any("inner", node=True)

_MAGNITUDE = Any("magnitude", node=True)
_EXCESS = Call("sub", _MAGNITUDE, Const(equals=1))
_PLAIN = Either(Call("sub", Any("base_again"), Any("bias_again")), Any("base_again"))
_SCALED = Call("mul", Call("mul", _MAGNITUDE, _LOW_RANK, commutes=True), _SCALE, commutes=True)
_DORA: Pattern = Opt(
    "to",
    Call(
        "add",
        _BASE,
        Call("add", Call("mul", _EXCESS, _PLAIN, commutes=True), _SCALED, commutes=True),
        commutes=True,
    ),
)


def site_of(path: str) -> str:
    """The place of an adapted module in its layer, e.g. ``self_attn.q_proj``."""
    module = path.removesuffix(".base_layer")
    return tail_names(module, layer_of(module) or "")


def _branches(root: fx.Node, branch: Pattern, base: Call) -> tuple[Match, list[Match]] | NoMatch:
    """Walk down a chain of sums: the base it ends in and the branches on the way."""
    found: list[Match] = []
    node: Value = root
    while True:
        if name_of(node) == "to":
            node = node.args[0]
            continue
        end = match(base, node)
        if isinstance(end, Match):
            return (end, found) if found else NoMatch(root.name, "a branch on it", "none")
        step = match(Call("add", _INNER, branch, commutes=True), node)
        if not step:
            assert isinstance(step, NoMatch)
            return step
        found.append(step)
        node = step["inner"]


def _foldable(
    root: fx.Node, end: Match, found: list[Match], fixed: dict[fx.Node, None], written: set[fx.Node]
) -> NoMatch | None:
    """Why a chain cannot be folded, if so."""
    nodes = (*end.nodes, *(node for step in found for node in step.nodes))
    whole = Match(root, {}, (*nodes, root))
    for step in found:
        if step["x"] is not end["x"] and end["x"] not in step.nodes:
            return NoMatch(step.root.name, f"a branch on {end['x'].name}", step["x"].name)
        if not _as_wide(end.root, step["b"]):
            return NoMatch(step.root.name, "a branch as wide as its base", str(shape_of(step["b"])))
        for name in ("a", "b"):
            if step[name] not in fixed:
                return NoMatch(step.root.name, "factors that are weights", name)
    if end["weight"] not in fixed:
        return NoMatch(end.root.name, "a base that is a weight", str(end["weight"]))
    if dtype_of(root) != dtype_of(end.root):
        return NoMatch(root.name, f"the base's dtype {dtype_of(end.root)}", str(dtype_of(root)))
    if any(reads_written(part, written) for part in (end, *found)):
        return NoMatch(end.root.name, "values that nothing writes in place", "a write")
    if any(user not in whole.nodes for node in end.nodes for user in node.users):
        return NoMatch(end.root.name, "a base used by the sum alone", "another user")
    return None


def _as_wide(base: fx.Node, b: Value) -> bool:
    """Whether a branch that ends in ``b`` gives as many columns as the base it is added to."""
    shape, whole = shape_of(b), shape_of(base)
    if shape is None or whole is None or len(shape) != 2:
        return False
    return same_size(shape[0], whole[-1])


def _deltas(found: list[Match]) -> list[Value]:
    return [v for step in reversed(found) for v in (step["a"], step["b"], step.get("scale", 1.0))]


def _tops(graph: fx.Graph) -> list[fx.Node]:
    """Sums, and casts of sums, that are not themselves part of a longer sum; last first."""
    sums = [
        n for n in calls(graph, "add", "to") if name_of(n) == "add" or (name_of(n.args[0]) == "add")
    ]
    return list(reversed(sums))


def _fold_dora(
    graph: fx.Graph, root: fx.Node, fixed: dict[fx.Node, None], written: set[fx.Node]
) -> fx.Node | None:
    found = match(_DORA, root)
    if not found or found["base_again"] is not found["base"]:
        return None
    if found.get("bias_again") is not found["bias"]:
        return None
    pieces = (found["weight"], found["magnitude"], found["a"], found["b"])
    if any(piece not in fixed for piece in pieces) or not safe_to_replace(found):
        return None
    if reads_written(found, written) or not _as_wide(found["base"], found["b"]):
        return None
    if dtype_of(root) != dtype_of(found["base"]):
        return None
    path = path_of(found["base"])
    scale = found["scale"]
    with graph.inserting_before(root):
        folded = call(graph, "fold_dora", *pieces, scale, path=path)
        return call(graph, "linear", found["x"], folded, found["bias"], path=path)


def _chain(
    root: fx.Node, branch: Pattern, base: Call, fixed: dict[fx.Node, None], written: set[fx.Node]
) -> tuple[Match, list[Match]] | NoMatch | None:
    """The base and the branches of a sum that folds; why it does not; None where it is no such."""
    chain = _branches(root, branch, base)
    if isinstance(chain, NoMatch):
        return None
    failure = _foldable(root, *chain, fixed, written)
    return chain if failure is None else failure


def _fold_linear(
    graph: fx.Graph, root: fx.Node, fixed: dict[fx.Node, None], written: set[fx.Node]
) -> Value:
    chain = _chain(root, _BRANCH, _BASE, fixed, written)
    if not isinstance(chain, tuple):
        return chain
    end, found = chain
    path = path_of(end.root)
    with graph.inserting_before(root):
        folded = call(graph, "fold_lora", end["weight"], *_deltas(found), path=path)
        return call(graph, "linear", end["x"], folded, end["bias"], path=path)


def _fold_embedding(
    graph: fx.Graph, root: fx.Node, fixed: dict[fx.Node, None], written: set[fx.Node]
) -> Value:
    chain = _chain(root, _LOOKUP_BRANCH, _TABLE, fixed, written)
    if not isinstance(chain, tuple):
        return chain
    end, found = chain
    path = path_of(end.root)
    with graph.inserting_before(root):
        # tables are [V, E] = (B A)^T: fold in the transposed sense, [E, V]; A is looked up in too
        turned = call(graph, "t", end["weight"], path=path)
        deltas = _deltas(found)
        deltas[::3] = [call(graph, "t", a, path=path) for a in deltas[::3]]
        folded = call(graph, "fold_lora", turned, *deltas, path=path)
        table = call(graph, "contiguous", call(graph, "t", folded, path=path), path=path)
        return call(graph, "embedding", end["x"], table, path=path)


def fold_lora(graph: fx.Graph, context: Context) -> PassResult:
    """Fold every LoRA and DoRA branch that may be folded; the result counts them."""
    count, misses = 0, list[tuple[str, NoMatch]]()
    sweep(graph)  # a dead reader of a branch is no user
    weights_first(graph)
    fixed, written = weight_only(graph), written_memory(graph)
    for root in _tops(graph):
        if not root.users:
            continue
        new: Value = None
        for fold in (_fold_dora, _fold_linear, _fold_embedding):
            if site_of(path_of(root)) in context.side:
                break
            new = fold(graph, root, fixed, written)
            if new is not None:
                break
        if isinstance(new, fx.Node):
            root.replace_all_uses_with(new)
            sweep(graph)
            count += 1
        elif new is not None:
            misses.append((path_of(root), new))
    if count:
        weights_first(graph)
    return PassResult(count, (*misses, *_left(graph, {path for path, _ in misses})))


def _left(graph: fx.Graph, told: set[str]) -> list[tuple[str, NoMatch]]:
    """Adapters that stay branches, but for those whose reason was told."""
    fixed = weight_only(graph)
    found = []
    for node in calls(graph, "linear", "embedding"):
        module = _adapted_by(node)
        if module and node not in fixed and module not in told:
            reason = NoMatch(node.name, "an adapter that folds", "a branch that stays")
            found.append((path_of(node), reason))
    return found


def _adapted_by(node: fx.Node) -> str:
    """The module whose branch begins with a call; "" for all other calls.

    PEFT's factors are modules of their own; those of DeepSpeed-Chat belong to the linear itself.
    """
    factor = node.args[1]
    while isinstance(factor, fx.Node) and name_of(factor) in ("t", "to", "gather"):
        factor = factor.args[0]
    module, _, name = str(weight_name(factor)).rpartition(".")
    if name == "lora_right_weight":
        return module
    path = re.sub(r"lora_embedding_A", "lora_A", path_of(node))
    module, factors, _ = path.partition(".lora_A.")
    return module if factors else ""


#: Not in training: a sum rounded to the weight's dtype can erase what was just learned.
FOLD_LORA = Pass(
    "fold_lora",
    fold_lora,
    provides=frozenset({"lora_folded"}),
    conflicts=frozenset({"qkv_stacked", "gate_up_stacked", "mlp_fused"}),
    may_add=frozenset({*FOLDS, "t", "contiguous"}),
)
