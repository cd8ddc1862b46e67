"""A pass of your own: ``python examples/add_a_pass.py``.

Granite multiplies what attention and MLP give by a constant before it joins the residual stream,
for every token and every layer. ``linear(x, W) * c`` is ``linear(x, c W)``, and ``c W`` depends on
parameters only: the pass below writes it so, and hoisting moves the product into the prepare graph,
which runs once per weight version. (The price is memory: a scaled copy of each such weight.)
"""

from __future__ import annotations

import torch
import transformers
from torch import fx

import hybrid_fx
from hybrid_fx.capture import capture
from hybrid_fx.passes import (
    NORMALIZE,
    Context,
    Pass,
    PassResult,
    Pipeline,
    Rule,
    apply_rule,
    copy_graph,
    run_passes,
)
from hybrid_fx.passes.graph import call, path_of
from hybrid_fx.passes.pattern import Any, Call, Const, Match
from hybrid_fx.passes.show import changes, listing

# 1. Where it fits: a linear that nothing else reads, times a constant, in either order.
LINEAR = Call("linear", Any("x"), Any("weight", node=True), Any("bias"), name="linear", users=1)
PATTERN = Call("mul", LINEAR, Const("factor", (int, float)), commutes=True)


# 2. What stands there afterwards. ``None`` would decline.
def scaled_linear(graph: fx.Graph, found: Match) -> fx.Node:
    """The linear with its weight and bias multiplied."""
    path, factor = path_of(found["linear"]), found["factor"]
    weight = call(graph, "mul", found["weight"], factor, path=path)
    bias = found["bias"]
    if bias is not None:
        bias = call(graph, "mul", bias, factor, path=path)
    return call(graph, "linear", found["x"], weight, bias, path=path)


def fold_scale(graph: fx.Graph, context: Context) -> PassResult:
    """Rewrite every place, and say how many there were."""
    return PassResult(apply_rule(graph, Rule(PATTERN, scaled_linear)))


# 3. Its contract. A linear inside of a fused MLP is no longer seen, so it must run before that.
FOLD_SCALE = Pass(
    "fold_scale",
    fold_scale,
    requires=frozenset({"canonical"}),
    provides=frozenset({"scales_folded"}),
    conflicts=frozenset({"mlp_fused"}),
    exact=False,  # c (x W) and x (c W) round differently
    modes=frozenset({"inference", "training"}),
)


def tiny_granite() -> transformers.GraniteForCausalLM:
    """Granite with random weights."""
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        residual_multiplier=0.22,
        pad_token_id=0,
    )
    return transformers.GraniteForCausalLM(config).eval()


def values(graph: fx.Graph, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits that a graph computes."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    held |= {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    names = [n.meta.get("weight", n.meta.get("input")) for n in graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        logits: torch.Tensor = fx.Interpreter(fx.GraphModule({}, graph)).run(
            *(held[name] for name in names)
        )
    return logits


def main() -> dict[str, float]:
    model = tiny_granite()
    ids = torch.randint(3, 64, (2, 7))

    print("The pass alone, on a captured graph: what changed in the first layer")
    graph = capture(model).graph
    run_passes(graph, NORMALIZE, Context())
    rewritten = copy_graph(graph)
    pipeline = Pipeline((FOLD_SCALE,), given=NORMALIZE.facts)
    (record,) = run_passes(rewritten, pipeline, Context())
    first = "model.layers.0"
    print(changes(listing(graph, first), listing(rewritten, first), around=0))
    before, after = values(graph, model, ids), values(rewritten, model, ids)
    error = float((after - before).norm() / before.norm())
    print(f"{record.result.count} places; relative difference of the logits {error:.1e}\n")

    print("The same pass in an engine, put where its contract fits")
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    engine = hybrid_fx.hybridize(model, passes=(FOLD_SCALE,), fusions="all", disk_cache=False)
    tokens = engine.generate(ids, max_new_tokens=12, do_sample=False)
    report = engine.explain(passes=True)
    for row in report.passes:
        if row.stage == "layers":
            print(f"  {row.name:<16}{row.count:>3} places")
    scaled = {stage: source.count("0.22") for stage, source in report.sources.items()}
    print(f"where the factor stands in the sources: {scaled}")
    same = float((tokens == wanted).float().mean())
    print(f"tokens equal to transformers': {same:.0%}")
    engine.close()
    return {"places": record.result.count, "error": error, "same": same}


if __name__ == "__main__":
    main()
