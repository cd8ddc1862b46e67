"""What stood under no_grad has no gradient when its scope is gone, and all else has its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from small_graphs import Builder, count
from torch import Tensor, fx

from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.driver import run_passes
from hybrid_fx.passes.pipeline import NORMALIZE


def _switch(build: Builder, on: bool) -> None:
    build.graph.call_function(torch._C._set_grad_enabled, (on,))


def _gradients(run: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randn(2, 4, generator=rng).requires_grad_() for _ in range(2))
    run(x, w).sum().backward()
    return [x.grad, w.grad]  # type: ignore[list-item]


def _same(graph: fx.Graph, wanted: Callable[[Tensor, Tensor], Tensor]) -> bool:
    module = fx.GraphModule({}, graph)
    pairs = zip(_gradients(module), _gradients(wanted), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _scoped(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    with torch.no_grad():
        scale = (y.exp() + w).sin()
    return y * scale


def _scoped_graph() -> fx.Graph:
    build = Builder()
    x, w = build.input("x", 2, 4), build.weight("w", 2, 4)
    y = build.call("mul", x, w)
    _switch(build, False)
    scale = build.call("sin", build.call("add", build.call("exp", y), w))
    _switch(build, True)
    return build.output(build.call("mul", y, scale))


def _picked(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        piece = (x * w)[1:]
    return piece * w[1:]


def test_a_scope_that_goes_leaves_its_gradients_cut() -> None:
    graph = _scoped_graph()
    run_passes(graph, NORMALIZE, Context(training=True))
    assert _same(graph, _scoped)
    assert count(graph, "detach") == 2, "where y and w enter the scope, and nowhere else"


def test_without_autograd_nothing_is_put_in_its_place() -> None:
    graph = _scoped_graph()
    run_passes(graph, NORMALIZE, Context())
    assert count(graph, "detach") == 0
    assert not _same(graph, _scoped), "the claim above is not empty"


def test_a_second_run_changes_nothing() -> None:
    graph = _scoped_graph()
    run_passes(graph, NORMALIZE, Context(training=True))
    before = str(graph)
    (record,) = run_passes(graph, NORMALIZE, Context(training=True))
    assert record.result.count == 0
    assert str(graph) == before


def test_pieces_of_a_split_outside_are_cut_inside() -> None:
    def wanted(x: Tensor, w: Tensor) -> Tensor:
        parts = (x * w).split(2, -1)
        with torch.no_grad():
            scale = parts[0].exp()
        return parts[0] * parts[1] * scale

    build = Builder()
    x, w = build.input("x", 2, 4), build.weight("w", 2, 4)
    parts = build.call("split", build.call("mul", x, w), 2, -1)
    _switch(build, False)
    scale = build.call("exp", build.call("getitem", parts, 0))
    _switch(build, True)
    pieces = [build.call("getitem", parts, index) for index in range(2)]
    graph = build.output(build.call("mul", build.call("mul", *pieces), scale))
    run_passes(graph, NORMALIZE, Context(training=True))
    assert _same(graph, wanted)


def test_a_scope_over_buffers_and_positions_needs_nothing() -> None:
    build = Builder()
    x, w = build.input("x", 2, 4), build.weight("w", 2, 4)
    table = build.weight("table", 2, 4, parameter=False)
    _switch(build, False)
    angles = build.call("cos", table)
    _switch(build, True)
    graph = build.output(build.call("mul", build.call("mul", x, w), angles))
    run_passes(graph, NORMALIZE, Context(training=True))
    assert count(graph, "detach") == 0


def test_gradients_switched_on_inside_a_scope_are_recorded() -> None:
    def wanted(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            one = x.exp()
            with torch.enable_grad():
                two = w.exp()
            three = w.sin()
        return one * two * three

    build = Builder()
    x, w = build.input("x", 2, 4), build.weight("w", 2, 4)
    _switch(build, False)
    one = build.call("exp", x)
    _switch(build, True)
    two = build.call("exp", w)
    _switch(build, False)
    three = build.call("sin", w)
    _switch(build, True)
    graph = build.output(build.call("mul", build.call("mul", one, two), three))
    run_passes(graph, NORMALIZE, Context(training=True))
    module = fx.GraphModule({}, graph)
    rng = torch.Generator().manual_seed(0)
    x0, w0 = (torch.randn(2, 4, generator=rng).requires_grad_() for _ in range(2))
    (got,) = torch.autograd.grad(module(x0, w0).sum(), [w0])
    (want,) = torch.autograd.grad(wanted(x0, w0).sum(), [w0])
    assert torch.equal(got, want)
    assert torch.autograd.grad(module(x0, w0).sum(), [x0], allow_unused=True) == (None,)


def test_a_slice_inside_a_scope_is_cut_too() -> None:
    build = Builder()
    x, w = build.input("x", 2, 4), build.weight("w", 2, 4)
    _switch(build, False)
    piece = build.call("getitem", build.call("mul", x, w), slice(1, None))
    _switch(build, True)
    rest = build.call("getitem", w, slice(1, None))
    graph = build.output(build.call("mul", piece, rest))
    run_passes(graph, NORMALIZE, Context(training=True))
    assert _gradients(fx.GraphModule({}, graph))[0] is None
    assert torch.equal(_gradients(fx.GraphModule({}, graph))[1], _gradients(_picked)[1])
