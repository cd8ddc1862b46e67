"""thread_kv: each attention reads and writes the KV workspace."""

from __future__ import annotations

from typing import Any

import pytest
from captured_models import canonical
from small_graphs import Builder, text

from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.spec import THREADED, check_graph
from hybrid_fx.passes.thread_kv import kv_shapes, thread_kv_decode, thread_kv_prefill


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "opt350", "mistral", "phi3"])
@pytest.mark.parametrize(
    ("thread", "operator"), [(thread_kv_prefill, "attend"), (thread_kv_decode, "attend_one")]
)
def test_the_workspace_is_threaded_through_every_attention(
    kind: str, thread: object, operator: str
) -> None:
    graph = canonical(kind)
    shapes = kv_shapes(graph)
    assert thread(graph, Context()).count == 2  # type: ignore[operator]
    check_graph(graph, stage="threaded", rules=THREADED)
    inputs = [n.meta["input"] for n in graph.nodes if "input" in n.meta]
    assert sorted(inputs) == sorted(
        ["input_ids", "position_ids", "slots", "key_valid", "pitch"]
        + [f"{kind}_{i}" for i in range(2) for kind in ("keys", "values")]
    )
    first, second = calls(graph, operator)
    assert first.args[3] is not second.args[3], "each attention has memory of its own"
    assert first.args[5] is second.args[5], "and all share one table of slots"
    assert [shape.window for shape in shapes] == [4 if kind == "mistral" else 0] * 2
    assert {shape.heads for shape in shapes} == {2 if kind in ("llama", "mistral", "phi3") else 4}
    after = text(graph)
    assert thread(graph, Context()).count == 0  # type: ignore[operator]
    assert text(graph) == after


def test_attention_with_dropout_is_not_threaded_and_says_so() -> None:
    build = Builder()
    q = build.input("q", 1, 4, 3, 8)
    graph = build.output(build.call("attention", q, q, q, 0.5, 0, 0.0, None, 0.1, path="a"))
    result = thread_kv_decode(graph, Context())
    assert result.count == 0
    assert result.misses[0][1].expected == "attention without dropout"


@pytest.mark.parametrize("thread", [thread_kv_prefill, thread_kv_decode])
def test_what_an_attention_was_captured_with_reaches_its_threaded_form(thread: Any) -> None:
    build = Builder()
    q, k, v = (build.input(name, 1, 4, 3, 8) for name in "qkv")
    sinks = build.weight("sinks", 4)
    graph = build.output(build.call("attention", q, k, v, 0.3, 3, 20.0, sinks, path="a"))
    assert thread(graph, Context()).count == 1
    (new,) = calls(graph, "attend", "attend_one")
    assert new.args[:3] == (q, k, v)
    assert [arg.meta["input"] for arg in new.args[3:8]] == [
        "keys_0", "values_0", "slots", "key_valid", "pitch",
    ]  # fmt: skip
    assert new.args[8:] == (0.3, 3, 20.0, sinks)
