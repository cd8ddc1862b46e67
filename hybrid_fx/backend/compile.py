"""The backend: rewrite one graph, report what became of it, and hand it on to be run.

Weights are inputs of the graph at every call, in training and in inference: nothing that depends
on them is kept, so nothing can be stale.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ..errors import StrictError
from ..passes.canonicalize import simplify, spell_calls
from ..passes.contract import Context, Pipeline
from ..passes.driver import PassRecord, run_passes
from ..passes.graft import Snapshot, graft, snapshot, working_copy
from ..passes.graph import inside, name_of, sweep
from ..passes.layers import attends, layer_of, layer_paths, layer_with, nodes_by_layer
from ..passes.outcome import LayerReport, Missed
from ..passes.pattern import NoMatch
from ..passes.roles import LayerMatch, Policy, match_layer, tails
from ..passes.spec import PARTIAL
from .dynamo_graph import describe, is_training, lower, module_of, module_path, without_guards
from .options import BackendOptions, make_options
from .report import GraphReport, log, logger

#: Parts of a fused operator that say nothing of their own.
_PARTS = frozenset({"getitem", "split", "t", "contiguous"})


def hybrid_fx(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """The backend of ``torch.compile(model, backend="hybrid_fx", options={...})``.

    Args:
        gm: The graph Dynamo hands over; it is left as it is.
        example_inputs: What it was traced with.
        options: See :class:`~hybrid_fx.backend.options.BackendOptions`.
        mode: A mode of ``torch.compile``: inductor's, which lowers the graph then. torch takes
            either a mode or options.

    Raises:
        ConfigError: for unknown options.
        StrictError: with ``strict``, for a layer that is not rewritten. Dynamo hands errors of a
            backend on as the ``inner_exception`` of its ``BackendCompilerFailed``.
    """
    chosen = make_options({**(options or {}), "inner": "inductor"} if mode else options)
    module, report = rewrite(gm, chosen)
    log(report)
    if chosen.report is not None:
        chosen.report(report)
    return lower(chosen.inner, module, example_inputs, mode)


def rewrite(gm: fx.GraphModule, options: BackendOptions) -> tuple[fx.GraphModule, GraphReport]:
    """The module to hand on, and what became of its graph.

    Where nothing is replaced, that is ``gm`` itself.

    Raises:
        StrictError: with ``strict``, for a layer that is not rewritten.
    """
    start = time.perf_counter()
    training = is_training(gm.graph)
    inner = options.inner if isinstance(options.inner, str) else options.inner.__name__
    report = GraphReport(
        mode="training" if training else "inference",
        nodes=len(gm.graph.nodes),
        nodes_after=len(gm.graph.nodes),
        inner=inner,
    )
    pipeline = options.pipeline.sound_in(report.mode)
    try:
        with without_guards(gm.graph):
            module, report = _rewrite(gm, options, pipeline, report)
    except StrictError:
        raise
    except Exception as error:  # of any kind: a rewrite that fails must not take the model along
        if options.strict:
            raise StrictError(f"the graph could not be rewritten: {error}") from error
        logger.warning("a graph is handed on as it is: %s: %s", type(error).__name__, error)
        module, report = gm, replace(report, failure=f"{type(error).__name__}: {error}")
    return module, replace(report, seconds=time.perf_counter() - start)


def _rewrite(
    gm: fx.GraphModule, options: BackendOptions, pipeline: Pipeline, report: GraphReport
) -> tuple[fx.GraphModule, GraphReport]:
    if not _worth_a_copy(gm.graph, tails(options.policies)):
        return gm, report
    work = working_copy(gm.graph)
    describe(work)
    spell_calls(work)  # without functionalize: Dynamo's inputs and views see what is written
    simplify(work, training=report.mode == "training")
    sweep(work)
    before = snapshot(work)
    layers = _layers(work, options.policies)
    records: tuple[PassRecord, ...] = ()
    if found := {path: layer for path, layer in layers.items() if layer.found}:
        context = Context(layers=found, training=report.mode == "training")
        records = run_passes(work, pipeline, context, rules=PARTIAL)
    passes = {record.name: record.result.count for record in records}
    report = replace(report, layers=_reports(layers, work, before, records), passes=passes)
    module = gm
    if any(passes.values()):
        grafted = graft(gm.graph, work, before)
        declined = tuple(_missed(path, why) for path, why in grafted.declined)
        report = replace(report, declined=declined, replaced=grafted.count)
        if grafted.count:
            grafted.graph.lint()
            module = module_of(gm, grafted.graph)
            report = replace(report, nodes_after=len(grafted.graph.nodes))
    if options.strict:
        _refuse(report, layer_paths(work))
    return module, report


def _worth_a_copy(graph: fx.Graph, places: frozenset[str]) -> bool:
    """Whether a layer may stand in a graph as Dynamo hands it over; most hold none."""
    paths: dict[str, bool] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            path = module_path(node)
            if path not in paths:
                paths[path] = layer_with(path, places) is not None
            if paths[path] or (attends(node) and layer_of(path) is not None):
                return True
    return False


def _layers(work: fx.Graph, policies: Sequence[Policy]) -> dict[str, LayerMatch]:
    """Each layer of a working copy, and how it fits the policies."""
    nodes = nodes_by_layer(work, layer_paths(work, tails(policies)))
    return {path: match_layer(work, path, policies, here) for path, here in nodes.items()}


def _missed(what: str, miss: NoMatch) -> Missed:
    return Missed(what=what, node=miss.node, expected=miss.expected, found=miss.found)


def _reports(
    layers: Mapping[str, LayerMatch],
    work: fx.Graph,
    before: Snapshot,
    records: Sequence[PassRecord],
) -> tuple[LayerReport, ...]:
    """What became of each layer: its new operators, and the roles and passes that failed."""
    new = [n for n in work.nodes if n.op == "call_function" and n not in before.calls]
    found = []
    for path, layer in layers.items():
        missed = [_missed(role, miss) for role, miss in layer.missing.items()]
        missed += [
            _missed(record.name, miss)
            for record in records
            for at, miss in record.result.misses
            if at == path or at.startswith(f"{path}.")
        ]
        fused = {str(name_of(node)) for node in new if inside(node, path)} - _PARTS
        policy = layer.policy.name if layer else None
        found.append(LayerReport(path, policy, tuple(sorted(fused)), tuple(missed)))
    return tuple(found)


def _refuse(report: GraphReport, attending: Sequence[str]) -> None:
    """Raise for the first layer with attention that is not rewritten in full."""
    for layer in report.layers:
        if layer.path in attending and (layer.missed or not layer.policy):
            why = layer.missed[0] if layer.missed else "no policy fits"
            raise StrictError(
                f"layer {layer.path or 'of the graph'} is not rewritten in full: {why}; set "
                "strict=False to run that part as it is, or name the passes that fit in passes="
            )
    if report.declined:
        raise StrictError(
            f"a rewrite was left out: {report.declined[0]}; set strict=False to run that part as "
            "it is"
        )
