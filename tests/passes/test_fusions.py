"""fuse_rms_norm, fuse_add_norm, concat_qkv, concat_gate_up, fuse_mlp: the five questions of a pass.

Does it fire, does it decline, are the numbers kept, does it survive shared users, does a second
run change nothing. Numbers are held against the same graph before the pass, in the same dtype.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captured_models import canonical, model_of
from policy_graphs import described, layers_of, logits, through, weights
from small_graphs import Builder, count, far, run, same, text, values
from torch import fx
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hybrid_fx.passes import kernels
from hybrid_fx.passes.concat import concat_qkv
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.fuse_norm import fuse_add_norm, fuse_rms_norm
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.policies import POLICIES
from hybrid_fx.passes.roles import LayerMatch
from hybrid_fx.passes.spec import check_graph

LAYER = "layers.0"
F32, F16, F64 = torch.float32, torch.float16, torch.float64
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


@pytest.mark.parametrize("device", ["cpu", "another"])
@pytest.mark.parametrize("dtype", [F32, F16, torch.bfloat16, F64])
def test_the_rms_norm_operator_has_the_bits_of_the_module(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients too; as it is on a CPU, and as on other devices."""
    if device == "another":
        monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: kernels._normed(x, eps))
    for size, eps in ((1, 1e-6), (33, 1e-5), (896, 0.3)):
        norm = LlamaRMSNorm(size, eps).to(dtype)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(2, 3, size, dtype=dtype, requires_grad=True)
        kept = [norm.weight, x]
        for part in (x, x[:, :1]):
            got, wanted = kernels.rms_norm(part, norm.weight, eps), norm(part)
            assert torch.equal(got, wanted)
            seed = torch.randn_like(wanted)
            grads = (torch.autograd.grad(y, kept, seed, retain_graph=True) for y in (got, wanted))
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


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
    assert fuse_rms_norm(graph, described(LAYER, LLAMA)).count == fused
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
    assert fuse_rms_norm(graph, described(LAYER, LLAMA)).count == 1
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
    assert fuse_add_norm(graph, described(LAYER, GPT2)).count == 1
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
    assert fuse_add_norm(graph, described(LAYER, LLAMA)).count == 1
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
    assert fuse_add_norm(graph, described(LAYER, GPT2)).count == 1
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
    assert fuse_add_norm(graph, described(LAYER, GPT2)).count == 0
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
    assert concat_qkv(graph, described(LAYER, LLAMA)).count == 1
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
    result = concat_qkv(graph, described(LAYER, LLAMA))
    assert result.count == 0
    ((path, missed),) = result.misses
    assert (path, missed.expected) == (LAYER, REASONS[why])
    check_graph(graph, stage="concat_qkv")
    assert same(run(graph, given)[0], before)
