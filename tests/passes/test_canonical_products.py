"""A product with a matrix is a linear layer, bit by bit; any other product stays one."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from small_graphs import Builder, run, same, values
from torch import fx

from hybrid_fx.passes.canonicalize import canonicalize
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.graph import name_of
from hybrid_fx.passes.spec import check_graph

Make = Callable[[Builder, fx.Node, fx.Node], fx.Node]

#: What is written, of x [B, T, 4] and a matrix w [4, 5], and the operators that are left of it.
PRODUCTS: dict[str, tuple[Make, str]] = {
    "x @ w": (lambda b, x, w: b.raw(operator.matmul, x, w), "t linear"),
    "x.matmul(w)": (lambda b, x, w: b.raw("matmul", x, w), "t linear"),
    "x @ v.t()": (
        lambda b, x, w: b.raw(torch.matmul, x, b.raw("t", b.weight("v", 5, 4))),
        "linear",
    ),
    "x @ v.T": (
        lambda b, x, w: b.raw(torch.matmul, x, b.raw(getattr, b.weight("v", 5, 4), "T")),
        "linear",
    ),
    "x @ v.transpose": (
        lambda b, x, w: b.raw(operator.matmul, x, b.raw("transpose", b.weight("v", 5, 4), 0, 1)),
        "transpose t linear",
    ),
    "w @ v": (lambda b, x, w: b.raw(operator.matmul, w, b.weight("v", 5, 2)), "t linear"),
    "x @ many matrices": (
        lambda b, x, w: b.raw(operator.matmul, x, b.raw("unsqueeze", w, 0)),
        "unsqueeze matmul",
    ),
    "vector @ w": (
        lambda b, x, w: b.raw(operator.matmul, b.weight("v", 4), w),
        "matmul",
    ),
    "x @ vector": (lambda b, x, w: b.raw(operator.matmul, x, b.weight("v", 4)), "matmul"),
}


def _names(graph: fx.Graph) -> str:
    return " ".join(str(name_of(n)) for n in graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("what", PRODUCTS)
def test_a_product_with_a_matrix_is_a_linear_layer(what: str, dtype: torch.dtype) -> None:
    make, names = PRODUCTS[what]
    build = Builder()
    x = build.input("x", 2, 3, 4)
    graph = build.output(make(build, x, build.weight("w", 4, 5)))
    given = {name: tensor.to(dtype) for name, tensor in values(graph).items()}
    before = run(graph, given)[0]
    canonicalize(graph, Context())
    check_graph(graph, stage="canonicalize")
    assert _names(graph) == names
    assert same(run(graph, given)[0], before)
    assert canonicalize(graph, Context()).count == 0


def test_a_matrix_that_is_written_before_the_product_is_read_as_written() -> None:
    build = Builder()
    x, w = build.input("x", 2, 3, 4), build.weight("w", 5, 4, parameter=False)
    turned = build.call("t", w)
    build.call("mul_", w, 2.0)
    graph = build.output(build.call("matmul", x, turned))
    given = values(graph)
    before = run(graph, given)
    canonicalize(graph, Context())
    after = run(graph, given)
    assert same(after[0], before[0])
    assert same(list(after[1].values()), list(before[1].values()))
