"""fuse_rms_norm, fuse_add_norm, concat_qkv, concat_gate_up, fuse_mlp: STYLE's five questions.

Does it fire, does it decline, are the numbers kept, does it survive shared users, does a second
run change nothing. Numbers are held against the same graph before the pass, in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captured_models import canonical, model_of
from policy_graphs import layers_of, logits, through, weights
from small_graphs import Builder, count, far, run, same, text, values
from torch import fx

from hybrid_fx.passes.concat import concat_gate_up, concat_qkv
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.fuse_mlp import fuse_mlp
from hybrid_fx.passes.fuse_norm import fuse_add_norm, fuse_rms_norm
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.pattern import Match, match
from hybrid_fx.passes.policies import POLICIES
from hybrid_fx.passes.policies.patterns import activation, gated_mlp
from hybrid_fx.passes.roles import LayerMatch, Policy, Role
from hybrid_fx.passes.spec import check_graph

LAYER = "layers.0"
LLAMA = next(policy for policy in POLICIES if policy.name == "llama")
GPT2 = next(policy for policy in POLICIES if policy.name == "gpt2")
OPT = next(policy for policy in POLICIES if policy.name == "opt")
FIRES = {
    "fuse_rms_norm": ({"llama": 5, "qwen2": 5, "phi3": 5}, "rms_norm"),
    "concat_qkv": ({"llama": 2, "qwen2": 2, "opt": 2, "opt350": 2}, "concat_rows"),
    "concat_gate_up": ({"llama": 2, "qwen2": 2}, "concat_rows"),
    "fuse_mlp": ({"gpt2": 2, "opt": 2, "opt350": 2, "phi3": 2}, "plain_mlp"),
    "fuse_add_norm": ({"gpt2": 2, "opt350": 2}, "add_layer_norm"),
}
CASES = [(name, kind) for name, (kinds, _) in FIRES.items() for kind in kinds]


def _told(policy: Policy) -> Context:
    roles = frozenset(role.name for role in policy.roles)
    return Context(layers={LAYER: LayerMatch(LAYER, policy, roles, {})})


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_fires_keeps_the_numbers_and_a_second_run_changes_nothing(name: str, kind: str) -> None:
    graph = canonical(kind)
    told = layers_of(graph)
    before = logits(graph, weights(model_of(kind)))
    expected, operator = FIRES[name][0][kind], FIRES[name][1]
    assert through(graph, name, told=told) == [expected]
    if name != "fuse_mlp" or kind != "phi3":
        found = count(graph, operator)
        biased = name == "concat_qkv" and kind != "llama"
        assert found == (2 * expected if biased else expected)
    assert far(logits(graph, weights(model_of(kind))), before) < 2e-6
    after = text(graph)
    assert through(graph, name, told=told) == [0]
    assert text(graph) == after


@pytest.mark.parametrize("name", FIRES)
def test_it_declines_where_no_layer_is_described(name: str) -> None:
    graph = canonical("llama")
    before = text(graph)
    assert through(graph, name, told=Context()) == [0]
    assert sorted(text(graph).split("\n")) == sorted(before.split("\n"))


def _norm(
    build: Builder, x: fx.Node, *, wide: torch.dtype | None, back: torch.dtype | None
) -> fx.Node:
    """``weight * x * rsqrt(mean(x ** 2) + eps)``, under casts."""
    weight = build.weight("w", 4, dtype=x.meta["val"].dtype)
    place = f"{LAYER}.input_layernorm"
    inner = build.call("to", x, wide, path=place) if wide else x
    mean = build.call("mean", build.call("pow", inner, 2, path=place), -1, True, path=place)
    scale = build.call("rsqrt", build.call("add", mean, 1e-5, path=place), path=place)
    normed = build.call("mul", inner, scale, path=place)
    if back:
        normed = build.call("to", normed, back, path=place)
    return build.call("mul", weight, normed, path=place)


F32, F16, F64 = torch.float32, torch.float16, torch.float64
NORMS = {
    "float32": (F32, None, None, 1),
    "bfloat16 through float32": (torch.bfloat16, F32, torch.bfloat16, 1),
    "float16 through float32": (F16, F32, F16, 1),
    "float16 as it is": (F16, None, None, 0),
    "float16 that stays wide": (F16, F32, None, 0),
    "float32 through float16": (F32, F16, F32, 0),
    "float32 through float64": (F32, F64, F32, 0),
    "float64": (F64, None, None, 0),
}


@pytest.mark.parametrize("what", NORMS)
def test_an_rms_norm_is_fused_only_where_it_rounds_as_the_operator_does(what: str) -> None:
    dtype, wide, back, fused = NORMS[what]
    build = Builder()
    x = build.input("x", 2, 3, 4, dtype=dtype)
    graph = build.output(_norm(build, x, wide=wide, back=back))
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_rms_norm(graph, _told(LLAMA)).count == fused
    assert count(graph, "rms_norm") == fused
    assert same(run(graph, given)[0], before), "bit by bit"


def test_a_norm_whose_parts_others_use_leaves_them_their_values() -> None:
    build = Builder()
    x = build.input("x", 2, 3, 4)
    normed = _norm(build, x, wide=None, back=None)
    scale = calls(build.graph, "rsqrt")[0]
    graph = build.output(normed, scale)
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_rms_norm(graph, _told(LLAMA)).count == 1
    assert same(run(graph, given)[0], before)


def _add_norm(
    build: Builder, *, path: str = f"{LAYER}.ln_2", late: bool = False, full: bool = True
) -> tuple[fx.Node, fx.Node]:
    x, y = build.input("x", 2, 3, 4), build.input("y", 2, 3, 4)
    w, b = build.weight("w", 4), build.weight("b", 4)
    total = build.call("add", x, y, path=LAYER)
    weight = build.call("add", w, build.call("mean", total, (0, 1)), path=path) if late else w
    if full:
        return total, build.call("layer_norm", total, (4,), weight, b, 1e-5, path=path)
    return total, build.call("layer_norm", total, (4,), weight=weight, eps=1e-5, path=path)


def test_a_sum_that_others_use_is_handed_out_beside_the_norm() -> None:
    build = Builder()
    total, normed = _add_norm(build)
    graph = build.output(build.call("add", total, normed), total)
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_add_norm(graph, _told(GPT2)).count == 1
    assert count(graph, "add") == 1
    assert same(run(graph, given)[0], before)


def test_a_sum_before_an_rms_norm_is_handed_out_beside_it() -> None:
    build = Builder()
    x, y, w = build.input("x", 2, 3, 4), build.input("y", 2, 3, 4), build.weight("w", 4)
    total = build.call("add", x, y, path=LAYER)
    normed = build.call("rms_norm", total, w, 1e-5, path=f"{LAYER}.post_attention_layernorm")
    graph = build.output(build.call("add", total, normed))
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_add_norm(graph, _told(LLAMA)).count == 1
    assert count(graph, "add_rms_norm") == 1
    assert same(run(graph, given)[0], before)


def test_a_weight_that_is_computed_behind_the_sum_is_moved_in_front_of_it() -> None:
    build = Builder()
    x, y, w = build.input("x", 2, 4), build.input("y", 2, 4), build.weight("w", 4)
    total = build.call("add", x, y, path=LAYER)
    more = build.call("add", w, 1.0, path=LAYER)
    normed = build.call("layer_norm", total, (4,), more, None, 1e-5, path=LAYER)
    graph = build.output(normed)
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_add_norm(graph, _told(GPT2)).count == 1
    check_graph(graph, stage="fuse_add_norm")
    assert same(run(graph, given)[0], before)


@pytest.mark.parametrize(
    "why", ["another layer", "the tokens", "keywords", "a written sum", "a scalar"]
)
def test_a_sum_and_a_norm_stay_apart_because_of(why: str) -> None:
    build = Builder()
    if why == "a scalar":
        x = build.input("x", 2, 3, 4)
        total = build.call("add", x, 1.0, path=LAYER)
        normed = build.call("layer_norm", total, (4,), None, None, 1e-5, path=LAYER)
    elif why == "a written sum":
        x, y = build.input("x", 2, 3, 4), build.input("y", 2, 3, 4)
        total = build.call("add", x, y, path=LAYER)
        build.call("mul_", total, 2.0, path=LAYER)
        normed = build.call("layer_norm", total, (4,), None, None, 1e-5, path=LAYER)
    else:
        path = "layers.1.ln_1" if why == "another layer" else f"{LAYER}.ln_2"
        _, normed = _add_norm(build, path=path, late=why == "the tokens", full=why != "keywords")
    graph = build.output(normed)
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_add_norm(graph, _told(GPT2)).count == 0
    check_graph(graph, stage="fuse_add_norm")
    assert same(run(graph, given)[0], before)


def test_a_sum_at_the_end_of_a_layer_stays_apart_from_the_norm_of_the_next() -> None:
    build = Builder()
    x, y = build.input("x", 2, 3, 4), build.input("y", 2, 3, 4)
    total = build.call("add", x, y, path="layers.0")
    normed = build.call("layer_norm", total, (4,), None, None, 1e-5, path="layers.1.ln_1")
    graph = build.output(normed)
    roles = frozenset(role.name for role in GPT2.roles)
    layers = {path: LayerMatch(path, GPT2, roles, {}) for path in ("layers.0", "layers.1")}
    assert fuse_add_norm(graph, Context(layers=layers)).count == 0


def _three(build: Builder, change: str = "") -> list[fx.Node]:
    """Projections of one input; ``change`` makes the second odd."""
    x = build.input("x", 2, 3, 4)
    other = build.call("exp", x, path=LAYER)
    found = []
    for name, rows in (("q", 6), ("k", 3), ("v", 3)):
        odd = change if name == "k" else ""
        w = build.weight(f"{name}_w", rows, 4)
        bias = build.weight(f"{name}_b", rows) if odd == "a bias" else None
        place = f"{LAYER}.self_attn.{name}_proj"
        if odd == "the tokens":
            w = build.call("mul", w, build.call("mean", x), path=place)
        if odd == "a written input":
            build.call("mul_", x, 2.0, path=place)
        found.append(
            build.call("linear", other if odd == "another input" else x, w, bias, path=place)
        )
    return found


def test_joined_projections_keep_the_numbers_and_what_others_use() -> None:
    build = Builder()
    q, k, v = _three(build)
    graph = build.output(q, build.call("exp", k), build.call("add", k, v))
    given = values(graph)
    before = run(graph, given)[0]
    assert concat_qkv(graph, _told(LLAMA)).count == 1
    check_graph(graph, stage="concat_qkv")
    (joined,) = calls(graph, "linear")
    assert joined.meta["path"] == f"{LAYER}.self_attn"
    assert all(far(a, b) < 1e-6 for a, b in zip(run(graph, given)[0], before, strict=True))


REASONS = {
    "another input": "the input x",
    "a bias": "a bias on all of them or on none",
    "the tokens": "weights that do not depend on the tokens",
    "a written input": "values that nothing writes in place",
}


@pytest.mark.parametrize("why", REASONS)
def test_projections_stay_apart_and_the_reason_is_told(why: str) -> None:
    build = Builder()
    graph = build.output(*_three(build, why))
    given = values(graph)
    before = run(graph, given)[0]
    result = concat_qkv(graph, _told(LLAMA))
    assert result.count == 0
    ((path, missed),) = result.misses
    assert (path, missed.expected) == (LAYER, REASONS[why])
    check_graph(graph, stage="concat_qkv")
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
    assert fuse_mlp(graph, _told(LLAMA)).count == 1
    assert [count(graph, name) for name in ("gated_mlp", "linear", "silu")] == [1, 0, 0]
    assert far(run(graph, given)[0], before) < 1e-6
    assert fuse_mlp(graph, _told(LLAMA)).count == 0


@pytest.mark.parametrize("shared", ["gate", "joined", "product"])
def test_an_mlp_whose_inner_values_others_use_is_left_alone_and_says_so(shared: str) -> None:
    build = Builder()
    graph = build.output(*_mlp(build, shared=shared))
    before = text(graph)
    result = fuse_mlp(graph, _told(LLAMA))
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
    graph = build.output(_plain_mlp(build, write)[0])
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_mlp(graph, _told(OPT)).count == 0
    assert same(run(graph, given)[0], before)


@pytest.mark.parametrize("write", ["x", "gate_up", "down"])
def test_a_gated_mlp_with_a_write_between_its_linears_is_left_alone(write: str) -> None:
    build = Builder()
    graph = build.output(_mlp(build, write=write)[0])
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_mlp(graph, _told(LLAMA)).count == 0
    assert same(run(graph, given)[0], before)


def test_an_up_projection_that_others_use_is_computed_once() -> None:
    build = Builder()
    graph = build.output(*_plain_mlp(build))
    result = fuse_mlp(graph, _told(OPT))
    assert result.count == 0
    assert "up projection used by the MLP alone" in result.misses[0][1].expected
    assert count(graph, "linear") == 2


@pytest.mark.parametrize("cut", ["the other way round", "a narrow gate"])
def test_parts_that_are_no_gate_and_up_in_this_order_are_left_alone(cut: str) -> None:
    build = Builder()
    graph = build.output(_mlp(build, cut)[0])
    given = values(graph)
    before = run(graph, given)[0]
    assert fuse_mlp(graph, _told(LLAMA)).count == 0
    assert same(run(graph, given)[0], before)


def test_an_mlp_over_uneven_parts_is_left_alone() -> None:
    build = Builder()
    graph = build.output(_mlp(build, "uneven")[0])
    result = fuse_mlp(graph, _told(LLAMA))
    assert result.count == 0
    assert "halves of one linear" in result.misses[0][1].expected


def _apart(build: Builder, change: str = "") -> tuple[fx.Node, ...]:
    """An MLP whose gate and up are linear layers of their own; ``change`` makes up odd."""
    x = build.input("x", 2, 3, 4)
    place = f"{LAYER}.mlp"
    gate = build.call("linear", x, build.weight("g", 6, 4), None, path=f"{place}.gate_proj")
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
    assert fuse_mlp(graph, _told(LLAMA)).count == 1
    assert [count(graph, name) for name in ("split_gated_mlp", "linear", "silu")] == [1, 0, 0]
    assert same(run(graph, given)[0], before)
    assert fuse_mlp(graph, _told(LLAMA)).count == 0


def test_gate_and_up_that_were_joined_are_fused_over_one_product() -> None:
    build = Builder()
    graph = build.output(*_apart(build, "no bias"))
    given = values(graph)
    before = run(graph, given)[0]
    assert concat_gate_up(graph, _told(LLAMA)).count == 1
    assert fuse_mlp(graph, _told(LLAMA)).count == 1
    assert count(graph, "gated_mlp") == 1
    assert far(run(graph, given)[0], before) < 1e-6


@pytest.mark.parametrize(
    "change", ["another input", "another dtype", "another shape", "another user"]
)
def test_gate_and_up_of_their_own_are_left_alone_where_up_has(change: str) -> None:
    build = Builder()
    graph = build.output(*_apart(build, change))
    before = text(graph)
    result = fuse_mlp(graph, _told(LLAMA))
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
    assert fuse_mlp(graph, _told(policy)).count == 1
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
