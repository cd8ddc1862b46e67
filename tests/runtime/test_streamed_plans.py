"""Plans whose layers gather their own weights: what is whole when, in one process without ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captured_models import decoder
from tiny_models import VOCAB, adapted, tiny
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hybrid_fx.capture import capture
from hybrid_fx.config import HybridConfig
from hybrid_fx.engine.source import tensors_of
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.plan.build import build_plan, normalize
from hybrid_fx.plan.choice import optional_passes
from hybrid_fx.plan.plan import Plan
from hybrid_fx.runtime.runner import PlanRunner

LAYERS = 3


def _span(_: str) -> Any:
    return nullcontext(SimpleNamespace(tokens=0))


class Copies:
    """A stream that gathers by copying; it notes what happens, and what is whole meanwhile."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.whole: list[list[StorageWeakRef]] = []
        self.rows: list[Sequence[Tensor]] = []

    def begin(self, layers: Sequence[Sequence[Tensor]], timer: Any) -> None:
        self.rows = list(layers)

    def run(self, graph: Callable[..., Tensor], *arguments: Any) -> Tensor:
        self.events.append("run")
        return graph(*arguments)

    def issue(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        self.events.append(f"issue {self.number(parts)}")
        return parts

    def wait(self, pending: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self.events.append(f"wait {self.number(pending)}")
        assert not self.alive(), "the layer before is not needed any more"
        made = tuple(part.detach().clone() for part in pending)
        self.whole.append([StorageWeakRef(t.untyped_storage()) for t in made])
        return made

    def number(self, parts: Sequence[Tensor]) -> int:
        """Which layer's weights these are."""
        return next(i for i, row in enumerate(self.rows) if row is parts)

    def alive(self) -> int:
        """Of the weights that were made whole, how many are still held."""
        return sum(not one.expired() for layer in self.whole for one in layer)


@functools.cache
def planned(kind: str, lora: bool = False, *, stream: bool = True) -> tuple[Any, Plan]:
    """A tiny decoder of three layers and a plan of it."""
    model = decoder(kind) if kind == "gemma3" else tiny(kind, layers=LAYERS)
    model = adapted(model) if lora else model
    plan = build_plan(
        normalize(capture(model).graph),
        model=kind,
        vocab_size=VOCAB,
        passes=optional_passes(HybridConfig(), stream=stream),
        stream=stream,
    )
    return model, plan


def logits(model: Any, plan: Plan, stream: Any = None, ops: Any = None) -> Tensor:
    """Of two rows, some of their columns prefilled and some decoded; [B, T, V]."""
    runner = PlanRunner(plan, device=torch.device("cpu"), timer=_span, stream=stream)
    if ops is not None:
        for stage in ("prefill", "decode"):
            runner._functions[stage][stage].__globals__["op"] = ops
    runner.prepare(tensors_of(model))
    ids = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6).expand(2, 6)
    session = runner.session(batch=2, capacity=6)
    with torch.no_grad():
        parts = [session.forward(ids[:, :4], positions[:, :4], keep=4)]
        parts += [session.forward(ids[:, i : i + 1], positions[:, i : i + 1]) for i in (4, 5)]
    session.close()
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", True),
        ("gpt2", False),
        *(pytest.param(kind, False, marks=pytest.mark.deep) for kind in ("llama", "qwen2", "opt")),
        pytest.param("gemma3", False, marks=pytest.mark.deep),
    ],
)
def test_layers_that_gather_give_the_logits_of_those_that_do_not(kind: str, lora: bool) -> None:
    model, plan = planned(kind, lora)
    stream = Copies()
    got = logits(model, plan, stream)
    wanted = logits(model, planned(kind, lora, stream=False)[1])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(got, logits(model, plan)), "weights that are whole need no stream"
    assert stream.alive() == 0


def test_the_next_layer_is_under_way_while_one_computes() -> None:
    model, plan = planned("llama")
    stream = Copies()

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            if name == "linear":
                stream.events.append(name)
            return function(*given, **named)

        return run

    table = {**OPERATORS, "issue_gather": stream.issue, "wait_gather": stream.wait}
    ops = {name: noted(name, function) for name, function in table.items()}
    logits(model, plan, stream, SimpleNamespace(**ops, float32=torch.float32))
    linears = ["linear"] * 7
    forward = ["run", "issue 0", "wait 0", "issue 1", *linears, "wait 1", "issue 2", *linears]
    forward += ["wait 2", *linears, "linear"]
    assert stream.events == forward * 3, "in prefill as in decode: ranks may do either"


def test_what_stands_outside_of_layers_is_prepared_and_nothing_else() -> None:
    model, plan = planned("qwen2", True)
    names = {weight.name for weight in plan.manifest.weights}
    assert not any(".layers." in name for name in names)
    rows = [weight.layer for weight in plan.manifest.streamed]
    assert rows == sorted(rows)
    assert set(rows) == set(range(LAYERS))
    streamed = {weight.name for weight in plan.manifest.streamed}
    assert streamed == {name for name, _ in model.named_parameters() if ".layers." in name}
    assert not plan.manifest.lora


def test_equal_layers_share_a_function_and_the_last_has_its_own() -> None:
    for stage in ("prefill", "decode"):
        source = planned("llama")[1].sources[stage]
        assert source.count("def decoder_layer") == 2
        assert source.count(" = decoder_layer(") == LAYERS - 1
        assert source.count(" = decoder_layer_2(") == 1
        assert source.count("op.wait_gather") == source.count("op.issue_gather") == 2


def test_memory_is_told_in_bytes() -> None:
    model, plan = planned("llama")
    runner = PlanRunner(plan, device=torch.device("cpu"), timer=_span, stream=Copies())
    layer = sum(p.numel() * 4 for n, p in model.named_parameters() if ".layers.0." in n)
    assert runner.streamed_bytes == 2 * layer
