"""What every pass must hold, as functions that raise ``AssertionError`` with the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.contract import Context, Pass, PassResult, Pipeline
from ..passes.driver import run_passes
from ..passes.graph import value_of
from ..passes.hoist import Hoisted, hoist
from ..passes.pipeline import copy_graph
from ..passes.spec import RULES, Rule, check_graph
from .example import Example, text
from .run import distance, doubled, in_float64, run, same_bits, tensors_of, workspace

#: A rewritten graph may be this many times as far from float64 as the graph it was made of, or as
#: that graph moves when its weights and inputs are rounded; and a few units of rounding more.
FACTOR, UNITS = 8.0, 32.0


def check_pass(a_pass: Pass, example: Example, *, rules: Sequence[Rule] = RULES) -> PassResult:
    """Hold one pass to all claims on one example; the example stays as it is.

    The graph is legal behind the pass, and only operators of its ``may_add`` became more; results
    and all that the graph writes are equal bit by bit for a pass that is ``exact``, else within
    :data:`FACTOR` of the float64 error (see :func:`check_same`); a second run changes nothing.

    Raises:
        AssertionError: naming the pass, the claim, and the graph before and behind.
        IllegalGraphError: where the specification or the contract refuses the rewritten graph.
    """
    graph = copy_graph(example.graph)
    alone = Pipeline((a_pass,), given=a_pass.requires)
    (record,) = run_passes(graph, alone, example.context, rules=rules)
    check_same(example, graph, exact=a_pass.exact, what=a_pass.name)
    check_settled(a_pass, graph, example)
    return record.result


def check_pipeline(pipeline: Pipeline, example: Example, *, rules: Sequence[Rule] = RULES) -> None:
    """Hold a whole pipeline to the claims on results, and each step to those on the graph.

    Raises:
        AssertionError: naming the pipeline and the graph before and behind.
        IllegalGraphError: where a pass leaves an illegal graph, or more calls than it declares.
    """
    graph = copy_graph(example.graph)
    run_passes(graph, pipeline, example.context, rules=rules)
    exact = all(one.exact for one in pipeline)
    check_same(example, graph, exact=exact, what=" > ".join(pipeline.names))


def check_settled(a_pass: Pass, graph: fx.Graph, example: Example) -> None:
    """A run on a graph that the pass has rewritten changes nothing and counts nothing."""
    again = copy_graph(graph)
    count = a_pass.run(again, example.context).count
    same = text(again) == text(graph)
    _claim(same, f"a second run of {a_pass.name} changes the graph", example, again)
    _claim(count == 0, f"a second run of {a_pass.name} counts {count} rewrites", example, again)


def check_same(example: Example, graph: fx.Graph, *, exact: bool, what: str = "the pass") -> None:
    """``graph`` computes and writes what the graph of the example does, at every size.

    All calls of one example run on the same weights, so that what one writes the next one reads.
    Where ``exact`` is False, the measure is the original graph in float64. The error allowed is
    :data:`FACTOR` times the larger of the original's own error and of the float64 graph's answer
    to weights and inputs that are off by one rounding, plus :data:`UNITS` units of rounding.
    A result that is not finite in float64 is not compared.
    """
    for keep in ("all", 1) if "keep" in _inputs(graph) else (None,):
        old = _calls(example, example.graph, keep)
        new = _calls(example, graph, keep)
        if exact:
            for (place, a), (_, b) in zip(old, new, strict=True):
                _claim(same_bits(a, b), f"{what} changes {place}: {_gap(a, b)}", example, graph)
            continue
        wide = in_float64(example.graph)
        unit = _rounding(example.graph)
        reference = _calls(example, wide, keep, wide=True)
        shaken = _calls(example, wide, keep, wide=True, noise=unit)
        for (place, a), (_, b), (_, ref), (_, moved) in zip(
            old, new, reference, shaken, strict=True
        ):
            alike = a.dtype == b.dtype and a.shape == b.shape
            _claim(alike, f"{what} changes {place}: {_gap(a, b)}", example, graph)
            if not bool(ref.isfinite().all()):
                continue
            own, error = distance(a, ref), distance(b, ref)
            allowed = FACTOR * max(own, distance(moved, ref)) + UNITS * unit
            words = f"{what} changes {place}: relative error {error:.2g}, was {own:.2g}"
            _claim(error <= allowed, f"{words}, {allowed:.2g} is allowed", example, graph)


def check_hoist(example: Example) -> Hoisted:
    """What is hoisted depends on weights only, and the two stages compute what the graph did.

    Prepared tensors are made once and used for the calls of all sizes; they are the same when
    they are made again behind those calls; when a parameter changes, they follow.
    """
    staged = hoist(copy_graph(example.graph))
    check_graph(staged.prepare, stage="hoist, prepare")
    check_graph(staged.body, stage="hoist, body")
    weights = example.weights()
    _claim(not _inputs(staged.prepare), "prepare reads runtime inputs", example, staged.prepare)
    for name in ("", *(_parameters(example.graph))):
        given = _changed(weights, name)
        old = _calls(example, example.graph, None, given=given)
        new = _calls(example, staged.body, None, given=given, prepare=staged)
        said = f"the stages of hoist after a change of {name}" if name else "hoist"
        for (place, a), (_, b) in zip(old, new, strict=True):
            _claim(same_bits(a, b), f"{said}: {place}: {_gap(a, b)}", example, staged.body)
    return staged


def _parameters(graph: fx.Graph) -> tuple[str, ...]:
    """The parameters of a graph, the first few."""
    names = dict.fromkeys(n.meta["weight"] for n in graph.nodes if n.meta.get("parameter"))
    return tuple(names)[:3]


def _changed(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Copies of the weights, shared where they were; the one called ``name`` changed."""
    copies = {id(tensor): tensor.clone() for tensor in weights.values()}
    found = {key: copies[id(tensor)] for key, tensor in weights.items()}
    if name:
        found[name].add_(1)
    return found


def _inputs(graph: fx.Graph) -> set[str]:
    return {n.meta["input"] for n in graph.nodes if n.op == "placeholder" and "input" in n.meta}


def _rounding(graph: fx.Graph) -> float:
    """One unit of rounding of the narrowest type in a graph; operators know float32 at best."""
    dtypes = {v.dtype for v in map(value_of, graph.nodes) if isinstance(v, Tensor)}
    return max(torch.finfo(d).eps for d in dtypes | {torch.float32} if d.is_floating_point)


def _calls(
    example: Example,
    graph: fx.Graph,
    keep: int | str | None,
    *,
    given: Mapping[str, Tensor] | None = None,
    prepare: Hoisted | None = None,
    wide: bool = False,
    noise: float = 0.0,
) -> list[tuple[str, Tensor]]:
    """Every result of the calls of an example, and what its tensors hold behind them."""
    weights = dict(_changed(given, "")) if given is not None else example.weights()
    weights = doubled(weights, noise) if wide else weights
    prepared = run(prepare.prepare, weights, {}) if prepare else ()
    found: list[tuple[str, Tensor]] = []
    for size in example.sizes:
        inputs: dict[str, Any] = dict(example.inputs(size))
        inputs = dict(doubled(inputs, noise, 1)) if wide else inputs
        last_tokens = keep if isinstance(keep, int) else size[1]
        extra = workspace(graph, size, last_tokens)
        result = run(graph, weights, {**extra, **inputs}, prepared)
        cut = keep is not None and "keep" not in _inputs(graph)
        for index, tensor in enumerate(tensors_of(result)):
            last = tensor[:, -last_tokens:] if cut else tensor
            found.append((f"result {index} at (B, T) = {size}", last.clone()))
        found += [(f"what input {n!r} holds at {size}", t.clone()) for n, t in inputs.items()]
    found += [(f"what weight {name!r} holds", t) for name, t in weights.items()]
    if prepare:
        again = run(prepare.prepare, weights, {})
        for index, (old, new) in enumerate(zip(prepared, again, strict=True)):
            name = prepare.names[index]
            assert same_bits(old, new), f"prepared tensor {name} depends on more than parameters"
    return found


def _gap(a: Tensor, b: Tensor) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{list(a.shape)} {a.dtype} became {list(b.shape)} {b.dtype}"
    places = (a != b).nonzero()
    if not len(places):
        return "in NaN"
    at = tuple(places[0].tolist())
    return (
        f"{len(places)} of {a.numel()} values, at {list(at)} {a[at].item()} became {b[at].item()}"
    )


def _claim(holds: bool, what: str, example: Example, graph: fx.Graph) -> None:
    if not holds:
        raise AssertionError(f"{what}\nbehind:\n{text(graph)}before: {example!r}")


__all__ = ["Context", "check_hoist", "check_pass", "check_pipeline", "check_same", "check_settled"]
