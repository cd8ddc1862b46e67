"""Build the plan of a training forward: canonical graph -> thread masks -> emit.

Nothing is folded, stacked or fused: the operations of the model in the model's order, so that
values, gradients and random numbers are its own bit by bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import fx

from ..passes.contract import Context
from ..passes.driver import run_passes
from ..passes.emit import emit
from ..passes.layers import layer_paths
from ..passes.operators import OPERATORS
from ..passes.pipeline import NORMALIZE, TRAIN
from ..passes.spec import THREADED
from ..passes.thread_kv import kv_shapes
from ..passes.thread_masks import MASKS
from .build import kv_layers, number_weights
from .log import logged
from .plan import Manifest, Plan

#: Parameters of ``train``. What a call was not given is ``None``.
PARAMETERS = (
    *("input_ids", "attention_mask", "position_ids"),
    *MASKS,
    *("keep", "implementations", "weights"),
)
#: What a layer function is called; a second kind gets a number.
LAYER = "decoder_layer"


def build_training_plan(
    captured: fx.Graph,
    *,
    model: str,
    vocab_size: int,
    guards: Mapping[str, str | bool] | None = None,
) -> Plan:
    """Turn a graph captured for training, in place, into a plan.

    The plan's ``kv`` entries are its attentions, in the order of their implementations.

    Raises:
        IllegalGraphError: where an operation is not in the operator table.
    """
    _keep_gradient_hooks(captured)
    graph, context = captured, Context(training=True)
    records = run_passes(graph, NORMALIZE, context)
    layers = layer_paths(graph)
    attentions = kv_layers(kv_shapes(graph))
    records += run_passes(graph, TRAIN, context, rules=THREADED)
    weights = number_weights(graph)
    source = emit(
        graph,
        function="train",
        parameters=PARAMETERS,
        layer_name=LAYER,
        layers=layers,
    )
    called = len(re.findall(rf"\b{LAYER}(?:_\d+)?\(", source))
    defined = len(re.findall(rf"^def {LAYER}", source, re.MULTILINE))
    manifest = Manifest(
        model=model,
        vocab_size=vocab_size,
        weights=weights,
        prepared=(),
        kv=attentions,
        guards=dict(guards or {}),
        layers=tuple({"path": path, "whole": called - defined == len(layers)} for path in layers),
        passes=tuple(logged("training", records)),
    )
    return Plan(manifest=manifest, sources={"train": source})


def _keep_gradient_hooks(graph: fx.Graph) -> None:
    """What a hook says with ``requires_grad_()`` counts in training; elsewhere it is dropped."""
    for node in graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        if name == "requires_grad_" and node.args[1:] in ((), (True,)) and not node.kwargs:
            node.op, node.target = "call_function", OPERATORS["track_gradient"]
            node.args = node.args[:1]
