"""Policies: data that describes a decoder family, and what a layer that fits none is told."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from captured_models import canonical, model_of
from policy_graphs import layers_of, logits, through, weights
from small_graphs import far
from tiny_models import tiny
from torch import Tensor, nn

from hybrid_fx.capture import capture
from hybrid_fx.passes.concat import CONCAT_QKV
from hybrid_fx.passes.contract import Pipeline
from hybrid_fx.passes.driver import run_passes
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.layers import layer_of, layer_paths
from hybrid_fx.passes.pattern import NoMatch
from hybrid_fx.passes.pipeline import OPTIONAL
from hybrid_fx.passes.policies import POLICIES
from hybrid_fx.passes.roles import find_role
from hybrid_fx.plan.build import build_plan, normalize

FITS = {
    "llama": "llama",
    "qwen2": "qwen2",
    "gpt2": "gpt2",
    "opt": "opt",
    "opt350": "opt",
    "mistral": "llama",
    "qwen3": "llama",
    "phi3": "phi3",
    "gemma2": "gemma",
    "olmo2": "olmo2",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "qwen2moe": "mixture_shared",
    "qwen3moe": "mixture",
}


@pytest.mark.parametrize("kind", FITS)
def test_all_layers_of_a_family_match_its_policy(kind: str) -> None:
    layers = layers_of(canonical(kind)).layers
    assert len(layers) == 2
    assert {match.policy.name for match in layers.values()} == {FITS[kind]}
    for match in layers.values():
        assert match
        assert match.missing == {}
        assert match.found == {role.name for role in match.policy.roles}


@pytest.mark.parametrize("kind", FITS)
def test_all_fusions_together_keep_the_numbers(kind: str) -> None:
    graph = canonical(kind)
    given = weights(model_of(kind))
    before = logits(graph, given)
    through(graph, *OPTIONAL.names)
    assert far(logits(graph, given), before) < 1e-5


@pytest.mark.parametrize("kind", FITS)
def test_a_second_run_of_all_fusions_changes_nothing(kind: str) -> None:
    graph = canonical(kind)
    told = layers_of(graph)
    names = OPTIONAL.names
    through(graph, *names, told=told)
    before = str(graph)
    assert sum(through(graph, *names, told=told)) == 0
    assert str(graph) == before


def test_a_layer_that_lacks_one_of_two_norms_is_told_how_many_there_are() -> None:
    graph = canonical("llama")
    layer = next(iter(layers_of(graph).layers))
    role = POLICIES[[policy.name for policy in POLICIES].index("llama")].role("norm")
    assert role is not None
    assert len(find_role(graph, role, layer)) == 2
    one = find_role(graph, dataclasses.replace(role, at=("input_layernorm",)), layer)
    assert isinstance(one, NoMatch)
    assert (one.expected, one.found) == ("2 of norm", "1")


def test_a_policy_is_frozen_data() -> None:
    for policy in POLICIES:
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.name = "other"  # type: ignore[misc]
        for role in policy.roles:
            with pytest.raises(dataclasses.FrozenInstanceError):
                role.at = ()  # type: ignore[misc]
            assert dataclasses.replace(role) == role


def test_policies_have_names_of_their_own() -> None:
    names = [policy.name for policy in POLICIES]
    assert len(names) == len(set(names))
    for policy in POLICIES:
        roles = [role.name for role in policy.roles]
        assert len(roles) == len(set(roles))
        assert policy.role("attention of nobody") is None


class _Projection(nn.Module):
    """A projection of another kind: a sum of products, or a linear of something else."""

    def __init__(self, projection: nn.Linear, *, product: bool) -> None:
        super().__init__()
        self.inner = projection
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        if self.product:
            return torch.einsum("bti,oi->bto", x, self.inner.weight)
        result: Tensor = self.inner(x.tanh())
        return result


def test_a_layer_with_a_replaced_projection_declines_at_the_node_and_others_match() -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = _Projection(attention.q_proj, product=True)
    graph = normalize(capture(model).graph)
    first, second = layers_of(graph).layers.values()
    assert first
    assert not second
    missed = second.missing["q"]
    assert set(second.missing) == {"q"}
    assert missed.expected == "linear with 3 arguments"
    assert missed.found == f"einsum ({missed.node})"
    through(graph, "concat_qkv")
    assert len(calls(graph, "concat_rows")) == 1, "the other layer is rewritten"


def test_a_projection_of_another_input_is_not_joined_with_the_others() -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = _Projection(attention.q_proj, product=False)
    graph = normalize(capture(model).graph)
    before = logits(graph, weights(model))
    pipeline = Pipeline((CONCAT_QKV,), given={"canonical"})
    (record,) = run_passes(graph, pipeline, layers_of(graph))
    assert record.result.count == 1
    ((path, missed),) = record.result.misses
    assert path == "model.layers.1"
    assert missed.expected == "the input tanh"
    assert far(logits(graph, weights(model)), before) < 1e-5


@pytest.mark.parametrize(
    ("role", "expected", "found"),
    [
        ("q", "linear with 3 arguments", "tanh"),
        ("mlp", "silu with 1 arguments", "gelu"),
    ],
)
def test_a_missing_role_names_node_expected_and_found(role: str, expected: str, found: str) -> None:
    if role == "mlp":
        graph = normalize(capture(tiny("llama", hidden_act="gelu")).graph)
    else:
        model = tiny("llama")
        for layer in model.model.layers:
            layer.self_attn.q_proj = nn.Tanh()
            layer.self_attn.k_proj = nn.Linear(32, 32, bias=False)
            layer.self_attn.v_proj = nn.Linear(32, 32, bias=False)
        graph = normalize(capture(model).graph)
    match = next(iter(layers_of(graph).layers.values()))
    missed = match.missing[role]
    assert isinstance(missed, NoMatch)
    assert missed.expected == expected
    assert missed.found.startswith(f"{found} (")
    assert any(node.name == missed.node for node in graph.nodes)


def test_a_layer_that_fits_no_policy_says_so_for_each_role_and_still_makes_a_plan() -> None:
    graph = normalize(capture(tiny("llama", hidden_act="gelu")).graph)
    plan = build_plan(graph, model="odd", vocab_size=64)
    for row in plan.manifest.layers:
        assert row["policy"] is None  # type: ignore[index,call-overload]
        assert row["nearest"] == "llama"  # type: ignore[index,call-overload]
        missed = row["missed"]  # type: ignore[index,call-overload]
        assert {entry["what"] for entry in missed} >= {"mlp"}  # type: ignore[index,union-attr,call-overload]
        for entry in missed:  # type: ignore[union-attr]
            assert set(entry) == {"what", "node", "expected", "found"}  # type: ignore[arg-type]
            assert all(entry.values())  # type: ignore[union-attr]


def test_layers_are_found_by_where_attention_stands() -> None:
    assert layer_paths(canonical("gpt2")) == ("transformer.h.0", "transformer.h.1")
    assert layer_of("model.layers.3.self_attn") == "model.layers.3"
    assert layer_of("0.mlp") == "0"
    assert layer_of("model.norm") is None
    assert layer_of("") is None
