"""gather: every weight is made whole once."""

from __future__ import annotations

import pytest
from captured_models import canonical, model_of
from policy_graphs import logits as logits_of
from policy_graphs import weights
from small_graphs import same, text

from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.gather import gather_weights
from hybrid_fx.passes.graph import name_of


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_every_weight_passes_a_gather_once(kind: str) -> None:
    graph = canonical(kind)
    held = weights(model_of(kind))
    before = logits_of(graph, held)
    placeholders = [n for n in graph.nodes if "weight" in n.meta and n.op == "placeholder"]
    assert gather_weights(graph, Context()).count == len(placeholders)
    for node in placeholders:
        assert [name_of(user) for user in node.users] == ["gather"]
    assert same(logits_of(graph, held), before)
    after = text(graph)
    assert gather_weights(graph, Context()).count == 0
    assert text(graph) == after
