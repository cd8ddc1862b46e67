"""Trace a causal LM's cache-free forward, ``(input_ids, position_ids) -> logits``, once.

The traced call has B = 2 rows and T = 9 tokens, both symbolic in the graph, so that the result
serves every batch and every length, one included. For training, a call is traced with the very
arguments that it is given: what the model makes of a missing one is part of its graph.
Placeholders come out bound: weights by their qualified names, symbolic sizes by the input they
are a size of.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compat.placement import device_of, unreadable
from ..errors import CaptureError
from ..passes.graph import sweep
from ..passes.operators import OPERATORS
from .cache_windows import check_windows
from .dynamo import Trace, trace
from .idle_hooks import without_idle_hooks
from .mixed_precision import refuse_autocast, refuse_prepared
from .peft_seam import traceable_adapters
from .registry import canonical_attention
from .watch import Watch, for_some_sizes

_ROWS, _TOKENS = 2, 9


@dataclass(frozen=True)
class Captured:
    """The captured graph of one training flag.

    Attributes:
        graph: Placeholders are bound, see :mod:`hybrid_fx.passes.graph`; the output is the logits.
        training: The training flag it was captured under.
    """

    graph: fx.Graph
    training: bool


def _logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    out: Tensor = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
    ).logits
    return out


def _refuse(model: nn.Module) -> None:
    refuse_prepared(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(f"{type(model).__name__} is an encoder-decoder model")
    if getattr(config, "attention_chunk_size", None):
        raise CaptureError("chunked attention reaches only the mask, which capture leaves out")
    if (fault := unreadable(model)) is not None:
        raise CaptureError(fault)


def _inputs(model: nn.Module, given: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Arguments [B, T] of one call by name and dtype, both sizes marked symbolic."""
    device = device_of(model)
    places = torch.arange(_TOKENS, device=device).repeat(_ROWS, 1)
    inputs = {
        name: (places if name == "position_ids" else torch.ones_like(places)).to(dtype, copy=True)
        for name, dtype in given.items()
    }
    for value in inputs.values():
        torch._dynamo.mark_dynamic(value, 0)
        torch._dynamo.mark_dynamic(value, 1)
    return inputs


def _trace(model: nn.Module, inputs: Mapping[str, Tensor], timeout: float | None) -> Trace:
    return trace(
        _logits,
        model,
        inputs["input_ids"],
        inputs.get("attention_mask"),
        inputs.get("position_ids"),
        watch=Watch(type(model).__name__, timeout),
    )


def capture(model: nn.Module, *, training: bool = False, timeout: float | None = None) -> Captured:
    """Capture ``model``'s forward under one training flag; flags are restored.

    Args:
        timeout: Seconds of tracing; ``None`` is no limit.

    Raises:
        CaptureError: where the forward cannot be traced as one graph with symbolic sizes.
        CaptureTimeoutError: where that takes too long.
    """
    _refuse(model)
    inputs = _inputs(model, {"input_ids": torch.int64, "position_ids": torch.int64})
    flags = {module: module.training for module in model.modules()}
    try:
        for module in flags:
            module.training = training
        with torch.set_grad_enabled(training), canonical_attention(model):
            with traceable_adapters(model), without_idle_hooks(model, training=training):
                traced = _trace(model, inputs, timeout)
    finally:
        for module, flag in flags.items():
            module.training = flag
    with _lasting():
        graph = _bind(traced, model, inputs)
        for name in inputs:
            if not any(n.meta.get("input") == name for n in graph.nodes):
                raise CaptureError(f"the forward does not read {name}")
        check_windows(graph, model)
    return Captured(graph, training)


def capture_call(
    model: nn.Module, given: Mapping[str, torch.dtype], *, timeout: float | None = None
) -> Captured:
    """Capture the training forward of a call that is given these arguments.

    Every module keeps its training flag. An argument that the model ignores is no input of the
    graph; what it derives itself from a missing one (positions, say) is computed in the graph.

    Args:
        given: The dtypes of ``"input_ids"``, and of ``"attention_mask"`` and ``"position_ids"``
            where they are given; each [B, T].
        timeout: Seconds of tracing; ``None`` is no limit.

    Raises:
        CaptureError: where the forward cannot be traced as one graph with symbolic sizes, or
            builds its masks in a way that cannot be repeated beside the graph.
        CaptureTimeoutError: where tracing takes too long.
    """
    _refuse(model)
    inputs = _inputs(model, given)
    # Under grad Dynamo drops or refuses what a hook says with requires_grad_().
    hooked = any(module._forward_hooks for module in model.modules())
    with torch.set_grad_enabled(not hooked), canonical_attention(model):
        with traceable_adapters(model):
            traced = _trace(model, inputs, timeout)
    with _lasting():
        return Captured(_bind(traced, model, inputs), True)


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """What is wrong with a whole trace is so with each trace of the structure."""
    try:
        yield
    except CaptureError as error:
        error.lasting = True
        raise


def _named_tensors(model: nn.Module) -> dict[int, tuple[str, bool]]:
    """Identity of every parameter and buffer -> its first qualified name, and if a parameter."""
    found: dict[int, tuple[str, bool]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (name, True))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found.setdefault(id(buffer), (name, False))
    return found


def _bind(traced: Trace, model: nn.Module, inputs: Mapping[str, Tensor]) -> fx.Graph:
    """Say what each placeholder stands for, where each node stands, and what its value is."""
    graph = traced.module.graph
    refuse_autocast(graph)
    tensors = _named_tensors(model)
    identity = {id(tensor): name for name, tensor in inputs.items()}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    symbols: dict[str, tuple[fx.Node, int]] = {}
    sizes: list[fx.Node] = []
    for node, value in zip(placeholders, traced.arguments, strict=True):
        val = node.meta.get("example_value")
        if isinstance(value, int) or isinstance(val, torch.SymInt):
            sizes.append(node)
        elif id(value) in identity:
            node.meta["input"] = identity[id(value)]
            for dim, size in enumerate(val.shape):
                symbols.setdefault(str(size), (node, dim))
        elif id(value) in tensors:
            node.meta["weight"], node.meta["parameter"] = tensors[id(value)]
        else:
            raise CaptureError(f"the graph reads {node.name}, no parameter, buffer or input")
    for node in sizes:
        _bind_size(graph, node, symbols)
    paths = {id(module): name for name, module in model.named_modules()}
    for node in graph.nodes:
        _place(node, paths)
    _single_output(graph)
    _refuse_what_is_left_out(traced)
    sweep(graph)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users and "weight" in node.meta:
            graph.erase_node(node)
    return graph


def _bind_size(graph: fx.Graph, node: fx.Node, symbols: Mapping[str, tuple[fx.Node, int]]) -> None:
    if node.users:
        source = symbols.get(str(node.meta.get("example_value")))
        if source is None:
            raise CaptureError(f"the graph reads the size {node.name}, of no known input")
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            size = graph.call_function(OPERATORS["size"], (source[0], source[1]))
        size.meta |= {"path": "", "val": node.meta.get("example_value")}
        node.replace_all_uses_with(size)
    graph.erase_node(node)


def _place(node: fx.Node, paths: Mapping[int, str]) -> None:
    """Fill ``path`` and ``val`` from what Dynamo recorded, and drop its own entries."""
    stack: Mapping[Any, Any] = node.meta.get("nn_module_stack") or {}
    path = ""
    for key in stack:
        number = re.match(r"\d+", str(key))
        path = paths.get(int(number.group()) if number else -1, path)
    kept: dict[str, Any] = {
        k: node.meta[k] for k in ("weight", "parameter", "input") if k in node.meta
    }
    val = node.meta.get("val", node.meta.get("example_value"))
    node.meta.clear()
    node.meta |= {"path": path, "val": val, **kept}


def _refuse_what_is_left_out(traced: Trace) -> None:
    """A graph does the same at every call, and leaves Python as it is."""
    if traced.conditions:
        raise CaptureError(for_some_sizes(", ".join(traced.conditions)))
    if traced.writes:
        written = traced.writes[0]
        raise CaptureError(f"the forward or a hook in it changes a Python object: {written}")


def _single_output(graph: fx.Graph) -> None:
    output = next(node for node in graph.nodes if node.op == "output")
    results = output.args[0]
    if isinstance(results, tuple | list) and len(results) > 1:
        raise CaptureError(
            f"the forward keeps {len(results) - 1} tensors beside the logits (a hook or a module "
            "stores them in Python); remove what stores them to run from graphs"
        )
    logits = results[0] if isinstance(results, tuple | list) else results
    if not isinstance(logits, fx.Node):
        raise CaptureError("the forward returned no logits")
    output.args = (logits,)
