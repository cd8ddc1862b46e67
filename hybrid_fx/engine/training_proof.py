"""Prove a training graph on the live model before it serves: loss, logits, gradients, numbers.

A small batch goes forward and backward through the graph and through the module, on the same
weights and from the same random state. What the user sees of it is nothing: gradients are taken
of stand-ins for the parameters, and the random state is put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.transformers import output_cache_name
from ..generate import position_limit
from ..runtime.closeness import TOLERANCE
from ..runtime.configured import loss_of
from ..runtime.random_state import random_state, set_random_state
from ..runtime.training import TrainingRunner
from .proof import telling
from .training_call import TrainingCall

_ROWS = 3
_IGNORED = -100
#: Fields of a model's output that the graph gives; it leaves out the KV cache.
_FIELDS = ("loss", "logits")


@dataclass(frozen=True)
class Proof:
    """What a comparison found.

    Attributes:
        output: The class of what the module returns.
        difference: What differs, or "".
        settled: Whether the numbers could tell: those of weights that hold NaN cannot.
    """

    output: type
    difference: str = ""
    settled: bool = True


@dataclass(frozen=True)
class _Step:
    """The results of one forward and backward, and where the random state ended."""

    results: Mapping[str, Tensor]
    state: Tensor
    output: Any = None


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing off; it changes when things are computed, never what."""
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    try:
        for module in switched:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def prove(
    model: nn.Module,
    causal: Any,
    runner: TrainingRunner,
    tensors: Mapping[str, Tensor],
    call: TrainingCall,
) -> Proof:
    """Hold ``runner`` against ``model`` for calls like ``call``.

    Results must be equal bit by bit; where the module itself gives other bits from run to run, as
    some kernels of a GPU do, within the tolerance of its dtype.

    Args:
        causal: The language model inside of ``model``.
        tensors: Every parameter and buffer by qualified name.
    """
    device = call.input_ids.device
    batch = _batch(causal, runner, call)
    stand_ins = _stand_ins(runner, tensors)
    forked = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"),
        torch.enable_grad(),
        without_checkpointing(model),
    ):
        start = random_state(device)

        def by_module() -> _Step:
            set_random_state(device, start)
            return _by_module(model, batch, stand_ins)

        mine = _by_graph(causal, runner, batch, stand_ins)
        theirs = by_module()
        kind = type(theirs.output)
        fields = {name for name, value in theirs.output.items() if value is not None}
        if extra := sorted(fields - {*_FIELDS, output_cache_name(kind)}):
            return Proof(kind, f"the module returns {', '.join(extra)} as well")
        if not all(bool(value.isfinite().all()) for value in theirs.results.values()):
            return Proof(kind, settled=False)
        difference = _difference(mine, theirs)
        if difference and (again := by_module()) and _difference(again, theirs):
            difference = _difference(mine, theirs, within=True)
    return Proof(kind, difference)


def _batch(causal: Any, runner: TrainingRunner, call: TrainingCall) -> TrainingCall:
    """A random batch with what ``call`` has: padding left, right and in between, packed rows."""
    windows = [a.window for a in runner.plan.manifest.kv if a.window]
    tokens = max([8, *(window + 4 for window in windows if window <= 64)])
    tokens = min(tokens, position_limit(causal.config) or tokens)
    rng = torch.Generator("cpu").manual_seed(0)
    device = call.input_ids.device
    said = causal.config.get_text_config(decoder=True)
    # An embedding may have more rows than there are tokens.
    vocabulary = min(runner.plan.manifest.vocab_size, said.vocab_size)
    padding = getattr(causal.get_input_embeddings(), "padding_idx", None)

    def random() -> Tensor:
        ids = torch.randint(vocabulary, (_ROWS, tokens), generator=rng, device="cpu").to(device)
        if padding is not None and padding < vocabulary:
            ids[0, :2] = ids[2, 1] = padding  # the row whose gradient is left out
        return ids

    mask = torch.ones(_ROWS, tokens, device=device, dtype=torch.int64)
    mask[0, :3] = mask[1, -2:] = mask[2, 3:5] = 0
    places = torch.arange(tokens, device=device).repeat(_ROWS, 1)
    places[1, tokens // 2 :] -= tokens // 2
    places[2] = (places[2] - 2).clamp_min(0)
    labels = random()
    labels[0, :3] = _IGNORED
    keep = call.keep
    whole = isinstance(keep, int) and keep == 0
    kept = places[0, -3:] if isinstance(keep, Tensor) else min(keep, max(1, tokens - 3))
    if runner.checkpointed:  # then the model keeps no cache, which shows in the last bits
        call = replace(call, use_cache=False)
    given_mask = call.attention_mask
    return replace(
        call,
        input_ids=random(),
        attention_mask=None if given_mask is None else mask.to(given_mask.dtype),
        position_ids=None if call.position_ids is None else places,
        labels=labels if whole else None,
        keep=kept,
        loss={},
    )


def _stand_ins(runner: TrainingRunner, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves of their own in the memory of parameters, and copies of what may be written.

    Weights that would hide a mistake have other values, see :func:`telling`.
    """
    told = telling(dict(tensors), [w.name for w in runner.plan.manifest.weights])
    found: dict[int, Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        if id(tensor) not in found:
            value = told.get(name, tensor).detach()
            if not isinstance(tensor, nn.Parameter):
                value = value.clone()
            found[id(tensor)] = value.requires_grad_(tensor.requires_grad)
        result[name] = found[id(tensor)]
    return result


def _by_graph(
    causal: Any, runner: TrainingRunner, batch: TrainingCall, weights: Mapping[str, Tensor]
) -> _Step:
    logits = runner.logits(
        batch.input_ids,
        batch.attention_mask,
        batch.position_ids,
        keep=batch.keep,
        cached=batch.cached,
        weights=weights,
    )
    loss = None if batch.labels is None else loss_of(causal, logits, batch.labels, {})
    return _step(loss, logits, weights, None)


def _by_module(model: nn.Module, batch: TrainingCall, weights: Mapping[str, Tensor]) -> _Step:
    given: dict[str, Any] = {name: getattr(batch, name) for name in batch.given}
    given |= {"labels": batch.labels, "return_dict": True}
    if batch.use_cache is not None:
        given["use_cache"] = batch.use_cache
    if isinstance(batch.keep, Tensor) or batch.keep:
        given["logits_to_keep"] = batch.keep
    # Every name of a tied tensor is among the stand-ins, so nothing is left to be tied.
    out = torch.func.functional_call(model, dict(weights), (), given, tie_weights=False)
    return _step(out.loss, out.logits, weights, out)


def _step(loss: Tensor | None, logits: Tensor, weights: Mapping[str, Tensor], output: Any) -> _Step:
    """The results by name, gradients included."""
    state = random_state(logits.device)
    results = {"logits": logits.detach()}
    if loss is not None:
        results["loss"] = loss.detach()
    # A plain sum would be blind to what a norm over the vocabulary takes away.
    slope = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    target = loss if loss is not None else (logits.float() * slope).sum()
    wanted = {id(t): (name, t) for name, t in weights.items() if t.requires_grad}
    if wanted and target.requires_grad:
        leaves = [tensor for _, tensor in wanted.values()]
        gradients = torch.autograd.grad(target, leaves, allow_unused=True)
        for (name, _), gradient in zip(wanted.values(), gradients, strict=True):
            if gradient is not None:
                results[f"the gradient of {name}"] = gradient
    return _Step(results, state, output)


def _difference(mine: _Step, theirs: _Step, *, within: bool = False) -> str:
    if set(mine.results) != set(theirs.results):
        name = min(set(mine.results) ^ set(theirs.results))
        return f"only one of graph and module gives {name}"
    for name, value in theirs.results.items():
        got = mine.results[name]
        if got.dtype != value.dtype or got.shape != value.shape:
            return (
                f"{name}: {got.dtype} {list(got.shape)}, the module's {value.dtype} "
                f"{list(value.shape)}"
            )
        if not torch.equal(got, value):
            distance = float((got - value).norm() / value.norm().clamp_min(1e-30))
            if not within or distance > TOLERANCE.get(value.dtype, 1e-1):
                return f"{name} differs from the module's by {distance:.1e}"
    if not torch.equal(mine.state, theirs.state):
        return "it draws other random numbers than the module"
    return ""
