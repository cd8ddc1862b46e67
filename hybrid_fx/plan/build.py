"""Build a plan from a captured graph: the compiler, as it reads.

canonical graph -> match policies -> rewrite -> gather -> hoist -> thread the workspace -> emit
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..passes.contract import Context, Pipeline
from ..passes.driver import PassRecord, run_passes
from ..passes.emit import emit
from ..passes.fold_lora import FOLDS
from ..passes.graph import inside, name_of, shape_of, value_of
from ..passes.hoist import Hoisted, hoist, recipe
from ..passes.layers import layer_paths, nodes_by_layer
from ..passes.pipeline import DECODE, NORMALIZE, OPTIONAL, PREFILL, STAGE, STREAM, copy_graph
from ..passes.policies import POLICIES
from ..passes.roles import LayerMatch, Policy, match_layer
from ..passes.spec import THREADED, check_graph
from ..passes.thread_kv import KVShape, kv_shapes
from .log import hoisted, logged
from .plan import Manifest, Plan
from .prepare import prepare_source
from .records import KVLayer, Prepared, Streamed, Weight

INPUTS = ("input_ids", "position_ids", "slots", "key_valid", "pitch", "keep")
_MEMORY = ("prepared", "keys", "values")
#: What the graphs take beside these; a prompt may come as embeddings.
_MORE: dict[str, tuple[str, ...]] = {"prefill": ("embeds",), "decode": ()}

#: What a pass gives a layer, by the operator that it leaves there.
_FUSED = {
    "rms_norm": "norm",
    "add_rms_norm": "residual + norm",
    "add_layer_norm": "residual + norm",
    "gated_mlp": "mlp",
    "split_gated_mlp": "mlp",
    "plain_mlp": "mlp",
}


def normalize(graph: fx.Graph, *, training: bool = False) -> fx.Graph:
    """The canonical form of a captured graph, in place.

    Args:
        training: Whether it is to run under autograd.

    Raises:
        IllegalGraphError: where an operation is not in the operator table.
    """
    run_passes(graph, NORMALIZE, Context(training=training))
    return graph


def build_plan(
    canonical: fx.Graph,
    *,
    model: str,
    vocab_size: int,
    guards: Mapping[str, str | bool] | None = None,
    side: frozenset[str] = frozenset(),
    fusions: str = "measured",
    passes: Pipeline = OPTIONAL,
    policies: Sequence[Policy] = POLICIES,
    before: Sequence[PassRecord] = (),
    shard: tuple[int, int] = (0, 1),
    stream: bool = False,
) -> Plan:
    """Rewrite a canonical graph (left as it is) into a plan.

    Raises:
        IllegalGraphError: where a pass leaves a graph that the specification refuses.

    Args:
        model: What the model is called, for people.
        guards: What the capture assumed beside the model, see :mod:`hybrid_fx.capture`.
        side: Adapted modules, relative to their layer, whose LoRA stays a branch.
        shard: For which rank of how many.
        stream: Let each layer gather its own weights while it runs. A pass that makes new weights
            of them (:data:`~hybrid_fx.passes.pipeline.NEW_WEIGHTS`) would do so each time.
        fusions: ``"measured"`` or ``"all"``, see :class:`~hybrid_fx.passes.contract.Context`.
        passes: Over the layers, before gathers are put in.
        policies: Tried in this order.
        before: What passes did to ``canonical`` already, for the report.
    """
    graph = copy_graph(canonical)
    nodes = nodes_by_layer(graph, layer_paths(graph))
    layers = {path: match_layer(graph, path, policies, here) for path, here in nodes.items()}
    context = Context(layers=layers, side=side, fusions=fusions, shard=shard)
    records = run_passes(graph, passes + STAGE + (STREAM if stream else Pipeline()), context)
    reports = [_report(graph, match, records) for match in layers.values()]
    kv = kv_layers(kv_shapes(graph))
    log = [*logged("model", before), *logged("layers", records)]
    start, size = time.perf_counter(), len(graph.nodes)
    staged = hoist(graph)
    log.append(hoisted(staged, size, time.perf_counter() - start))
    weights = number_weights(staged.prepare)
    prepare, sites = prepare_source(staged, list(layers))
    sources, embeds = {"prepare": prepare}, False
    streamed = _streamed(staged.body)
    more = ["group"] * (shard[1] > 1) + ["shards"] * bool(streamed)
    for stage, pipeline in (("prefill", PREFILL), ("decode", DECODE)):
        body = copy_graph(staged.body)
        done = run_passes(body, pipeline, context)
        log += logged(stage, done)
        embeds |= any(record.name == "take_embeds" and record.result.count for record in done)
        check_graph(body, stage=stage, rules=THREADED)
        sources[stage] = emit(
            body,
            function=stage,
            parameters=INPUTS + _MEMORY + _MORE[stage] + tuple(more),
            layer_name="decoder_layer",
            layers=list(layers),
        )
    manifest = Manifest(
        model=model,
        vocab_size=vocab_size,
        weights=weights,
        prepared=_prepared(staged),
        kv=kv,
        guards=dict(guards or {}),
        layers=tuple(reports),
        lora=tuple(sites),
        embeds=embeds,
        passes=tuple(log),
        streamed=streamed,
        ranks=shard[1],
    )
    return Plan(manifest=manifest, sources=sources)


def kv_layers(shapes: Sequence[KVShape]) -> tuple[KVLayer, ...]:
    """The attentions of a graph as a manifest lists them."""
    return tuple(
        KVLayer(
            path=shape.path,
            kv_heads=shape.heads,
            head_size=shape.key_size,
            value_head_size=shape.value_size,
            window=shape.window or None,
            dtype=str(shape.dtype).removeprefix("torch."),
        )
        for shape in shapes
    )


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def number_weights(graph: fx.Graph) -> tuple[Weight, ...]:
    """Number the weights that a graph reads, for its source; and what the manifest says of them."""
    found: list[Weight] = []
    for node in graph.nodes:
        if node.op == "placeholder" and "weight" in node.meta:
            node.meta["index"] = len(found)
            shape = tuple(int(size) for size in shape_of(node) or ())
            name = node.meta["weight"]
            found.append(Weight(name=name, shape=shape, dtype=_dtype(value_of(node))))
    return tuple(found)


def _prepared(staged: Hoisted) -> tuple[Prepared, ...]:
    results = next(n for n in staged.prepare.nodes if n.op == "output").args[0]
    assert isinstance(results, tuple)
    folded: set[fx.Node] = set()
    for node in staged.prepare.nodes:
        if name_of(node) in FOLDS or not folded.isdisjoint(node.all_input_nodes):
            folded.add(node)
    return tuple(
        Prepared(
            name=name,
            recipe=text,
            shape=tuple(int(size) for size in shape_of(node) or ()),
            dtype=_dtype(value_of(node)),
            owns_memory=owned,
            packed=name_of(node) == "pack",
            folded=node in folded,
            stacked=_stacked(node),
        )
        for node, name, text, owned in zip(
            results, staged.names, staged.recipes, staged.owned, strict=True
        )
    )


def _stacked(node: fx.Node) -> tuple[str, ...]:
    """The recipes of what a result stacks, packed or not."""
    plain = node.args[0] if name_of(node) == "pack" else node
    assert isinstance(plain, fx.Node)
    if name_of(plain) != "concat_rows":
        return ()
    return tuple(recipe(piece) for piece in plain.args if isinstance(piece, fx.Node))


def _streamed(graph: fx.Graph) -> tuple[Streamed, ...]:
    """The weights that a graph gathers itself, as a manifest lists them."""
    rows = [n.meta for n in graph.nodes if n.op == "placeholder" and "streamed" in n.meta]
    return tuple(
        Streamed(layer=layer, name=name, shape=tuple(map(int, val.shape)), dtype=_dtype(val))
        for layer, meta in enumerate(rows)
        for name, val in zip(meta["streamed"], meta["val"], strict=True)
    )


def _report(graph: fx.Graph, match: LayerMatch, records: Sequence[PassRecord]) -> Mapping[str, Any]:
    """What became of one layer, as plain values."""
    here = [n for n in graph.nodes if n.op == "call_function" and inside(n, match.path)]
    names = [name_of(node) for node in here]
    fused = {_FUSED[name] for name in names if name in _FUSED}
    if "concat_rows" in names:
        joined = [len(n.args) for n in here if name_of(n) == "concat_rows"]
        fused |= {"qkv" if count == 3 else "gate_up" for count in joined}
    folds = sum(name in FOLDS for name in names)
    if folds:
        fused.add(f"lora ({folds} folded)")
    missed = [
        {"what": name, "node": miss.node, "expected": miss.expected, "found": miss.found}
        for name, miss in match.missing.items()
    ]
    missed += [
        {"what": record.name, "node": miss.node, "expected": miss.expected, "found": miss.found}
        for record in records
        for path, miss in record.result.misses
        if path == match.path or path.startswith(match.path + ".")
    ]
    return {
        "path": match.path,
        "policy": match.policy.name if match else None,
        "nearest": match.policy.name,
        "fused": sorted(fused),
        "missed": missed,
    }
