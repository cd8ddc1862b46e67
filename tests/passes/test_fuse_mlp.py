"""fuse_mlp: an MLP is one operator where its layer says so, and is left alone where it must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from policy_graphs import described
from small_graphs import Builder, count, far, run, same, text, values
from torch import fx

from hybrid_fx.passes.concat import concat_gate_up
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.fuse_mlp import fuse_mlp
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.pattern import Match, match
from hybrid_fx.passes.policies import POLICIES
from hybrid_fx.passes.policies.patterns import activation, gated_mlp
from hybrid_fx.passes.roles import Policy, Role

LAYER = "layers.0"
LLAMA = next(policy for policy in POLICIES if policy.name == "llama")
OPT = next(policy for policy in POLICIES if policy.name == "opt")


def assert_left_alone(graph: fx.Graph, policy: Policy) -> None:
    """Nothing of ``graph`` is fused, and it computes the same bits."""
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_mlp(graph, described(LAYER, policy)).count == 0
    assert same(run(graph, given)[0], before)


_CUTS: dict[str, object] = {"chunk": 2, "uneven": [5, 7], "a narrow gate": [1, 11]}


def _mlp(
    build: Builder, cut: str = "split", shared: str = "", write: str = ""
) -> tuple[fx.Node, fx.Node]:
    """A gated MLP over one linear whose halves are gate and up.

    ``write`` names what is written in place behind that linear.
    """
    x = build.call("neg", build.input("x", 2, 3, 4), path=LAYER)
    width = 11 if cut == "a narrow gate" else 6
    both = build.weight("gate_up", 12, 4, parameter=False)
    down = build.weight("down", 4, width, parameter=False)
    place = f"{LAYER}.mlp"
    joined = build.call("linear", x, both, None, path=place)
    if write:
        build.call("mul_", {"x": x, "gate_up": both, "down": down}[write], 2.0, path=place)
    sizes = _CUTS.get(cut, [6, 6])
    parts = build.call("chunk" if cut == "chunk" else "split", joined, sizes, -1, path=place)
    first = int(cut == "the other way round")
    gate = build.call("getitem", parts, first, path=place)
    up = build.call("getitem", parts, 1 - first, path=place)
    if cut == "uneven":
        gate = build.call("pad", gate, (0, 1), path=place)
        up = build.call("getitem", up, (..., slice(0, 6)), path=place)
    product = build.call("mul", build.call("silu", gate, path=place), up, path=place)
    out = build.call("linear", product, down, None, path=place)
    extra = {"gate": gate, "joined": joined, "product": product}.get(shared, x)
    return out, extra


@pytest.mark.parametrize("cut", ["split", "chunk"])
def test_a_gated_mlp_over_one_linear_is_fused(cut: str) -> None:
    build = Builder()
    graph = build.output(_mlp(build, cut)[0])
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_mlp(graph, described(LAYER, LLAMA)).count == 1
    assert [count(graph, name) for name in ("gated_mlp", "linear", "silu")] == [1, 0, 0]
    assert far(run(graph, given)[0], before) < 1e-6
    assert fuse_mlp(graph, described(LAYER, LLAMA)).count == 0


@pytest.mark.parametrize("shared", ["gate", "joined", "product"])
def test_an_mlp_whose_inner_values_others_use_is_left_alone_and_says_so(shared: str) -> None:
    build = Builder()
    graph = build.output(*_mlp(build, shared=shared))
    before = text(graph)
    result = fuse_mlp(graph, described(LAYER, LLAMA))
    assert result.count == 0
    ((path, missed),) = result.misses
    assert path == LAYER
    assert "another user" in missed.found or "shared" in missed.found
    assert text(graph) == before


def _plain_mlp(build: Builder, write: str = "") -> tuple[fx.Node, fx.Node]:
    """``down(relu(up(x)))`` and its up projection; ``write`` names what is written in between."""
    x = build.call("neg", build.input("x", 2, 3, 4), path=LAYER)
    weights = {
        "up": build.weight("up", 6, 4, parameter=False),
        "down": build.weight("down", 4, 6, parameter=False),
    }
    up = build.call("linear", x, weights["up"], None, path=f"{LAYER}.fc1")
    if write:
        build.call("mul_", {**weights, "x": x}[write], 2.0, path=LAYER)
    act = build.call("relu", up, path=LAYER)
    return build.call("linear", act, weights["down"], None, path=f"{LAYER}.fc2"), up


@pytest.mark.parametrize("write", ["x", "up", "down"])
def test_an_mlp_with_a_write_between_its_linears_is_left_alone(write: str) -> None:
    build = Builder()
    assert_left_alone(build.output(_plain_mlp(build, write)[0]), OPT)


@pytest.mark.parametrize("write", ["x", "gate_up", "down"])
def test_a_gated_mlp_with_a_write_between_its_linears_is_left_alone(write: str) -> None:
    build = Builder()
    assert_left_alone(build.output(_mlp(build, write=write)[0]), LLAMA)


def test_an_up_projection_that_others_use_is_computed_once() -> None:
    build = Builder()
    graph = build.output(*_plain_mlp(build))
    result = fuse_mlp(graph, described(LAYER, OPT))
    assert result.count == 0
    assert "up projection used by the MLP alone" in result.misses[0][1].expected
    assert count(graph, "linear") == 2


@pytest.mark.parametrize("cut", ["the other way round", "a narrow gate"])
def test_parts_that_are_no_gate_and_up_in_this_order_are_left_alone(cut: str) -> None:
    build = Builder()
    assert_left_alone(build.output(_mlp(build, cut)[0]), LLAMA)


def test_an_mlp_over_uneven_parts_is_left_alone() -> None:
    build = Builder()
    graph = build.output(_mlp(build, "uneven")[0])
    result = fuse_mlp(graph, described(LAYER, LLAMA))
    assert result.count == 0
    assert "halves of one linear" in result.misses[0][1].expected


def _apart(build: Builder, change: str = "", write: str = "") -> tuple[fx.Node, ...]:
    """An MLP whose gate and up are linear layers of their own; ``change`` makes up odd.

    ``write`` names what is written in place between the two.
    """
    place = f"{LAYER}.mlp"
    x = build.call("neg", build.input("x", 2, 3, 4), path=place)
    first = build.weight("g", 6, 4, parameter=False)
    gate = build.call("linear", x, first, None, path=f"{place}.gate_proj")
    if write:
        build.call("mul_", {"x": x, "gate": first}[write], 2.0, path=place)
    rows = 1 if change == "another shape" else 6
    dtype = torch.float64 if change == "another dtype" else torch.float32
    source = build.input("y", 2, 3, 4) if change == "another input" else x
    if change == "another dtype":
        source = build.call("to", x, dtype, path=place)
    weight = build.weight("u", rows, 4, dtype=dtype)
    bias = None if change == "no bias" else build.weight("b", rows, dtype=dtype)
    up = build.call("linear", source, weight, bias, path=f"{place}.up_proj")
    product = build.call("mul", build.call("silu", gate, path=place), up, path=place)
    if change == "another dtype":
        product = build.call("to", product, torch.float32, path=place)
    out = build.call("linear", product, build.weight("d", 4, 6), None, path=place)
    return (out, up) if change == "another user" else (out,)


def test_gate_and_up_that_were_not_joined_are_fused_as_they_stand_bit_by_bit() -> None:
    build = Builder()
    graph = build.output(*_apart(build))
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_mlp(graph, described(LAYER, LLAMA)).count == 1
    assert [count(graph, name) for name in ("split_gated_mlp", "linear", "silu")] == [1, 0, 0]
    assert same(run(graph, given)[0], before)
    assert fuse_mlp(graph, described(LAYER, LLAMA)).count == 0


@pytest.mark.parametrize("write", ["x", "gate"])
def test_gate_and_up_with_a_write_between_them_are_left_alone(write: str) -> None:
    build = Builder()
    assert_left_alone(build.output(*_apart(build, write=write)), LLAMA)


def test_gate_and_up_that_were_joined_are_fused_over_one_product() -> None:
    build = Builder()
    graph = build.output(*_apart(build, "no bias"))
    given = values(graph)
    before = run(graph, given)[0]
    assert concat_gate_up(graph, described(LAYER, LLAMA)).count == 1
    assert fuse_mlp(graph, described(LAYER, LLAMA)).count == 1
    assert count(graph, "gated_mlp") == 1
    assert far(run(graph, given)[0], before) < 1e-6


@pytest.mark.parametrize(
    "change", ["another input", "another dtype", "another shape", "another user"]
)
def test_gate_and_up_of_their_own_are_left_alone_where_up_has(change: str) -> None:
    build = Builder()
    graph = build.output(*_apart(build, change))
    before = text(graph)
    result = fuse_mlp(graph, described(LAYER, LLAMA))
    assert result.count == 0
    assert len(result.misses) == 1
    assert text(graph) == before


def test_the_tanh_form_of_gelu_is_not_taken_for_the_exact_one() -> None:
    exact: Callable[..., fx.Node] = lambda b, x: b.call("gelu", x, path=LAYER)  # noqa: E731
    for make, fits in (
        (exact, True),
        (lambda b, x: b.call("gelu", x, approximate="none", path=LAYER), True),
        (lambda b, x: b.call("gelu", x, approximate="tanh", path=LAYER), False),
    ):
        build = Builder()
        node = make(build, build.input("x", 2, 3))
        from hybrid_fx.passes.canonicalize import canonicalize

        build.output(node)
        canonicalize(build.graph, Context())
        found = match(activation("gelu"), calls(build.graph, "gelu")[0])
        assert isinstance(found, Match) == fits


def test_a_gated_mlp_of_another_activation_is_one_role_away() -> None:
    """A family with a new activation is a policy, not a pass."""
    policy = Policy(name="new", roles=(Role(name="mlp", pattern=gated_mlp("relu"), at=("mlp",)),))
    build = Builder()
    x = build.input("x", 2, 3, 4)
    place = f"{LAYER}.mlp"
    joined = build.call("linear", x, build.weight("w", 12, 4), build.weight("b", 12), path=place)
    parts = build.call("chunk", joined, 2, -1, path=place)
    gate, up = (build.call("getitem", parts, i, path=place) for i in (0, 1))
    product = build.call("mul", up, build.call("relu", gate, path=place), path=place)
    graph = build.output(build.call("linear", product, build.weight("d", 4, 6), None, path=place))
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_mlp(graph, described(LAYER, policy)).count == 1
    assert far(run(graph, given)[0], before) < 1e-6


@pytest.mark.parametrize("kind", ["silu", "relu", "gelu", "gelu_tanh"])
def test_a_fused_mlp_is_the_function_it_stands_for(kind: str) -> None:
    """Against float64."""
    from hybrid_fx.passes import kernels

    rng = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(s, generator=rng) for s in ((3, 5, 4), (12, 4), (4, 6)))
    plain_down = torch.randn(4, 12, generator=rng)
    functions = {
        "silu": F.silu,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    }
    act = functions[kind]
    kept = x.clone()
    got = kernels.plain_mlp(x, up, None, plain_down, None, kind)
    wanted = act(x.double() @ up.double().T) @ plain_down.double().T
    assert far(got, wanted) < 1e-6
    gate, value = (x.double() @ up.double().T).chunk(2, -1)
    got = kernels.gated_mlp(x, up, None, down, None, kind)
    assert far(got, (act(gate) * value) @ down.double().T) < 1e-6
    assert torch.equal(x, kept), "the input is not written"
