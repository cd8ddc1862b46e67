"""Graphs that broke a pass once, as Hypothesis shrank them; pinned with ``@example``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import fx

from hybrid_fx.passes.roles import Policy
from hybrid_fx.testing.builder import Builder
from hybrid_fx.testing.example import Example
from hybrid_fx.testing.graphs import context_of
from hybrid_fx.testing.names import LLAMA, policy

_DRAWN = policy(LLAMA, "silu", gated=False)


def _x(build: Builder, size: int = 4) -> fx.Node:
    return build.input("x", build.batch, build.tokens, size)


def _told(graph: fx.Graph, one: Policy = _DRAWN, **shared: str) -> Example:
    return Example(graph, context_of(graph, {"layers.0": one}), shared=shared)


def write_between_base_and_branch() -> Example:
    """The input of a base and its branch is written between the two."""
    build = Builder()
    x, path = _x(build), "layers.0.mlp.up_proj"
    base = build.call("linear", x, build.weight("w", 3, 4), None, path=path)
    build.call("mul_", x, 0.5)
    inner = build.call("linear", x, build.weight("a", 2, 4), None, path=path)
    low = build.call("linear", inner, build.weight("b", 3, 2), None, path=path)
    return _told(build.output(build.call("add", base, low, path=path)))


def written_buffer_as_lora_factor() -> Example:
    """A factor of a branch is a buffer that the graph writes behind it."""
    build = Builder()
    x, path = _x(build), "layers.0.mlp.up_proj"
    a = build.weight("a", 2, 4, parameter=False)
    base = build.call("linear", x, build.weight("w", 3, 4), None, path=path)
    inner = build.call("linear", x, a, None, path=path)
    low = build.call("linear", inner, build.weight("b", 3, 2), None, path=path)
    build.call("mul_", a, 0.5)
    return _told(build.output(build.call("add", base, low, path=path)))


def branch_that_broadcasts() -> Example:
    """A branch of one column is added to a base of three."""
    build = Builder()
    x, path = _x(build), "layers.0.mlp.up_proj"
    base = build.call("linear", x, build.weight("w", 3, 4), None, path=path)
    inner = build.call("linear", x, build.weight("a", 2, 4), None, path=path)
    low = build.call("linear", inner, build.weight("b", 1, 2), None, path=path)
    return _told(build.output(build.call("add", base, low, path=path)))


def input_of_an_mlp_written_inside() -> Example:
    """What an MLP reads is written between its two linears."""
    build = Builder()
    x, path = _x(build), "layers.0.mlp"
    up = build.call("linear", x, build.weight("up", 3, 4), None, path=path)
    build.call("mul_", x, 0.5)
    active = build.call("silu", up, path=path)
    return _told(
        build.output(build.call("linear", active, build.weight("down", 4, 3), None, path=path))
    )


def gated_input_written_inside() -> Example:
    """The same for a gated MLP over one linear."""
    build = Builder()
    x, path = _x(build), "layers.0.mlp"
    up = build.call("linear", x, build.weight("up", 6, 4), None, path=path)
    parts = build.call("chunk", up, 2, -1, path=path)
    gate, up = (build.call("getitem", parts, i, path=path) for i in (0, 1))
    build.call("mul_", x, 0.5)
    hidden = build.call("mul", build.call("silu", gate, path=path), up, path=path)
    graph = build.output(build.call("linear", hidden, build.weight("down", 4, 3), None, path=path))
    return _told(graph, policy(LLAMA, "silu", gated=True))


def input_written_between_gate_and_up() -> Example:
    """Gate and up are linears of their own, and their input is written between the two."""
    build = Builder()
    x, path = _x(build), "layers.0.mlp"
    gate = build.call("linear", x, build.weight("gate", 3, 4), None, path=f"{path}.gate_proj")
    build.call("mul_", x, 0.5)
    up = build.call("linear", x, build.weight("up", 3, 4), None, path=f"{path}.up_proj")
    hidden = build.call("mul", build.call("silu", gate, path=path), up, path=path)
    down = build.weight("down", 4, 3)
    graph = build.output(build.call("linear", hidden, down, None, path=f"{path}.down_proj"))
    return _told(graph, policy(LLAMA, "silu", gated=True))


def norm_weight_written_behind_the_sum() -> Example:
    """The weight of a norm, a buffer, is written between the sum and the norm."""
    build = Builder()
    x, path = _x(build), "layers.0.input_layernorm"
    weight = build.weight("w", 4, parameter=False)
    total = build.call("add", x, build.call("neg", x), path=path)
    total = build.call("add", total, build.call("exp", x), path=path)
    build.call("mul_", weight, 0.5)
    return _told(build.output(build.call("rms_norm", total, weight, 0.1, path=path)))


def projections_viewed_as_a_whole() -> Example:
    """A projection is viewed with its last two axes as one, which a slice cannot be."""
    build = Builder()
    x, path = _x(build), "layers.0.self_attn"
    parts = [
        build.call("linear", x, build.weight(n, 4, 4), None, path=f"{path}.{n}_proj") for n in "qkv"
    ]
    size = build.call("size", x, 0)
    flat = [build.call("view", part, (size, -1), path=path) for part in parts]
    return _told(build.output(*flat))


def _head(build: Builder) -> fx.Node:
    return build.call("linear", _x(build), build.weight("head", 3, 4), None, path="lm_head")


def sum_over_tokens() -> Example:
    """One logit for each token, and a bias for each of three tokens."""
    build = Builder()
    first = build.call("getitem", _head(build), (..., 0))
    bias = build.input("bias", build.tokens)
    return _told(build.output(build.call("add", first, bias)))


def logits_of_one_row() -> Example:
    build = Builder()
    return _told(build.output(build.call("getitem", _head(build), 0)))


def result_without_arguments() -> Example:
    build = Builder()
    _x(build)
    return _told(build.output(build.call("to", build.call("arange", 4), torch.float32)))


def result_of_weights_alone() -> Example:
    build = Builder()
    _x(build)
    return _told(build.output(build.weight("w", 4, 2)))


def several_results() -> Example:
    build = Builder()
    head = _head(build)
    return _told(build.output(head, build.call("neg", head)))


def write_through_plus() -> Example:
    """``+x`` is x: what writes into it writes into x."""
    build = Builder()
    x = build.call("neg", _x(build))
    written = build.call("add_", build.call("pos", x), 1.0)
    return _told(build.output(written, x))


def rows_and_columns_swapped(size: int) -> Example:
    """A view whose shape is that of its input at the sizes of the trace, and no others."""
    build = Builder()
    x = build.input("x", size, build.batch, build.tokens)
    batch, tokens = build.call("size", x, 1), build.call("size", x, 2)
    return _told(build.output(build.call("view", x, (batch, size, tokens))))


def torch_rms_norm() -> Example:
    """torch's own rms_norm takes the shape first, the operator of the table does not."""
    build = Builder()
    return _told(build.output(build.raw(F.rms_norm, _x(build), (4,), build.weight("w", 4), 0.1)))


def one_tensor_as_two_inputs() -> Example:
    """Two inputs are one tensor; one is written between projections of the other."""
    build = Builder()
    x, path = _x(build), "layers.0.self_attn"
    y = build.input("y", build.batch, build.tokens, 4)
    q = build.call("linear", x, build.weight("q", 4, 4), None, path=f"{path}.q_proj")
    build.call("mul_", y, 0.5)
    k, v = (
        build.call("linear", x, build.weight(n, 4, 4), None, path=f"{path}.{n}_proj") for n in "kv"
    )
    return _told(build.output(q, k, v), y="x")


def one_buffer_under_two_names() -> Example:
    """A buffer is written under one name and read under another."""
    build = Builder()
    x = _x(build)
    held, again = (build.weight(n, 4, parameter=False) for n in ("held", "again"))
    build.call("mul_", held, 0.5)
    return _told(build.output(build.call("add", x, build.call("neg", again))), again="held")


def adapters_beside_stacked_weights() -> Example:
    """Behind the stack of two base weights, the same roles find the factors of their adapters."""
    build = Builder()
    x, parts = _x(build), []
    for name in ("gate_proj", "up_proj"):
        path = f"layers.0.mlp.{name}"
        weight, a = build.weight(f"{name}.w", 3, 4), build.weight(f"{name}.a", 2, 4)
        base = build.call("linear", x, weight, None, path=f"{path}.base_layer")
        inner = build.call("linear", x, a, None, path=f"{path}.lora_A.default")
        factor = build.weight(f"{name}.b", 3, 2)
        low = build.call("linear", inner, factor, None, path=f"{path}.lora_B.default")
        parts.append(build.call("add", base, low, path=path))
    product = build.call("mul", build.call("silu", parts[0]), parts[1], path="layers.0.mlp")
    return _told(build.output(product), policy(LLAMA, "silu", gated=True))


def number_in_front_of_a_narrow_tensor() -> Example:
    """torch.mul rounds its number to bfloat16 before it multiplies; Python's operator does not."""
    build = Builder()
    x = build.input("x", build.batch, build.tokens, 4, dtype=torch.bfloat16)
    return Example(build.output(build.raw(torch.mul, 0.7978845608028654, x)))


#: Name of the pass -> what broke it.
FOUND: Mapping[str, tuple[Callable[[], Example], ...]] = {
    "fold_lora": (
        write_between_base_and_branch,
        written_buffer_as_lora_factor,
        branch_that_broadcasts,
    ),
    "fuse_mlp": (
        input_of_an_mlp_written_inside,
        gated_input_written_inside,
        input_written_between_gate_and_up,
    ),
    "fuse_add_norm": (norm_weight_written_behind_the_sum,),
    "concat_qkv": (projections_viewed_as_a_whole, one_tensor_as_two_inputs),
    "concat_gate_up": (adapters_beside_stacked_weights,),
    "keep_last_tokens": (
        sum_over_tokens,
        logits_of_one_row,
        result_without_arguments,
        result_of_weights_alone,
        several_results,
    ),
    "canonicalize": (
        write_through_plus,
        lambda: rows_and_columns_swapped(2),
        torch_rms_norm,
        number_in_front_of_a_narrow_tensor,
    ),
    "hoist": (one_buffer_under_two_names,),
}
