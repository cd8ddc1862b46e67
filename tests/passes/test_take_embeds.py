"""take_embeds: embeddings stand in for ids exactly where the module looks ids up."""

from __future__ import annotations

import torch
from small_graphs import Builder, run, values
from torch import fx

from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.take_embeds import take_embeds

EMBED = "model.embed_tokens"


def _graph(*, branch: bool = False, scale: bool = False, stray: bool = False) -> fx.Graph:
    """``head(embed(ids))``: with a low-rank branch or a scale in the table's module, or ids that
    are read elsewhere too."""
    b = Builder()
    ids = b.input("input_ids", 2, 3, dtype=torch.int64)
    table, head = b.weight(f"{EMBED}.weight", 7, 4), b.weight("head.weight", 7, 4)
    x = b.call("embedding", ids, table, path=f"{EMBED}.base_layer" if branch else EMBED)
    if branch:
        a, up = b.weight(f"{EMBED}.lora_a", 7, 2), b.weight(f"{EMBED}.lora_b", 4, 2)
        low = b.call("embedding", ids, a, path=EMBED)
        x = b.call("add", x, b.call("linear", low, up, path=EMBED), path=EMBED)
    if scale:
        x = b.call("mul", x, 2.0, path=EMBED)
    out = b.call("linear", x, head, path="head")
    if stray:
        pad = b.call("ne", ids, 0)
        out = b.call("mul", out, b.call("unsqueeze", pad, -1))
    return b.output(out)


def _without_embeds(graph: fx.Graph, given: dict[str, torch.Tensor]) -> torch.Tensor:
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    result: torch.Tensor = fx.Interpreter(fx.GraphModule({}, graph)).run(*map(given.get, names))
    return result


def test_embeddings_replace_all_that_the_module_gives() -> None:
    for kind in ({}, {"branch": True}, {"scale": True}, {"branch": True, "scale": True}):
        graph = _graph(**kind)
        assert take_embeds(graph, Context()).count == 1
        (given,) = calls(graph, "given")
        assert [user.name for user in given.users] == [
            "linear_1" if kind.get("branch") else "linear"
        ]


def test_without_embeddings_nothing_changes_and_with_them_the_ids_do_not_count() -> None:
    graph = _graph(branch=True, scale=True)
    given = values(graph)
    given["input_ids"] = torch.tensor([[1, 5, 2], [0, 6, 3]])
    before, _ = run(graph, given)
    assert take_embeds(graph, Context()).count == 1
    assert torch.equal(_without_embeds(graph, given), before)
    embeds = torch.full((2, 3, 4), 0.5)
    wanted = embeds @ given["head_weight"].T
    for ids in (given["input_ids"], torch.zeros(2, 3, dtype=torch.int64)):
        got, _ = run(graph, given | {"embeds": embeds, "input_ids": ids})
        assert torch.allclose(got, wanted, atol=1e-6)


def test_a_second_run_changes_nothing() -> None:
    graph = _graph()
    take_embeds(graph, Context())
    size = len(graph.nodes)
    assert take_embeds(graph, Context()).count == 0
    assert len(graph.nodes) == size


def test_ids_that_are_read_elsewhere_are_not_replaced() -> None:
    graph = _graph(stray=True)
    result = take_embeds(graph, Context())
    assert result.count == 0
    ((_, miss),) = result.misses
    assert miss.node == "input_ids"
    assert miss.found == "also ne"


def test_lookups_in_modules_that_share_none_are_not_replaced() -> None:
    b = Builder()
    ids = b.input("input_ids", 2, 3, dtype=torch.int64)
    one, two = b.weight("a.weight", 7, 4), b.weight("b.weight", 7, 4)
    x = b.call(
        "add", b.call("embedding", ids, one, path="a"), b.call("embedding", ids, two, path="b")
    )
    result = take_embeds(b.output(x), Context())
    assert result.count == 0
    assert result.misses[0][1].found == "lookups in a, b"
