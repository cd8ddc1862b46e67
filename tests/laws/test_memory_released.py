"""``release_inference_cache=True``: what generating needs is gone after each generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chat_lora import chat_adapted
from memory_ledger import live_bytes, without_collector
from profiles import deep
from tiny_models import adapted, prompt, tiny

import hybrid_fx

pytestmark = pytest.mark.usefixtures("ledger")

CALL = prompt((5, 1, 8), 3) | {"max_new_tokens": 12}
RIGHT_PADDED = CALL | {name: CALL[name].flip(1) for name in ("input_ids", "attention_mask")}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny("llama"),
    "peft": lambda: adapted(tiny("llama")),
    "chat": lambda: chat_adapted(tiny("llama")),
}
#: Route -> the arguments of a call that takes it.
ROUTES: dict[str, dict[str, Any]] = {
    "fast": CALL,
    "HF loop": CALL | {"num_beams": 3},
    "module": RIGHT_PADDED,
}


def odd(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor that fails at the third token."""
    if ids.shape[1] > CALL["input_ids"].shape[1] + 2:
        raise LookupError("a processor fails")
    return scores


def growth(engine: Any, route: str) -> tuple[int, int]:
    """Bytes more than before: right after a generate by ``route``, and back in train mode."""
    engine.train()
    with without_collector():
        before = live_bytes()
        engine.eval()
        engine.generate(**ROUTES[route])
        generated = live_bytes() - before
        engine.train()
        return generated, live_bytes() - before


@pytest.mark.parametrize("name", MODELS)
def test_nothing_remains_after_a_generate_by_any_route(name: str) -> None:
    with hybrid_fx.hybridize(MODELS[name](), release_inference_cache=True) as engine:
        for route in ROUTES:
            growth(engine, route)  # a first use may leave what is not inference: constants
            assert growth(engine, route) == (0, 0), route


@pytest.mark.parametrize("name", ["peft", *deep("llama", "chat")])
def test_an_explanation_leaves_nothing_in_training(name: str) -> None:
    with hybrid_fx.hybridize(MODELS[name](), release_inference_cache=True) as engine:
        engine.generate(**CALL)
        engine.train()
        with without_collector():
            before = live_bytes()
            report = engine.explain()
            assert live_bytes() == before
            assert report.prepared_bytes > 0
            assert {d.choice for d in report.lora} == ({"fold"} if name != "llama" else set())
            engine.eval()
            engine.explain()
            assert live_bytes() > before
            engine.train()
            assert live_bytes() == before


def test_without_the_option_memory_is_kept_and_this_test_sees_it() -> None:
    with hybrid_fx.hybridize(tiny("llama")) as engine:
        generated, training = growth(engine, "fast")
        report = engine.explain()
        assert generated >= training >= report.prepared_bytes + report.kv_bytes > 0


@pytest.mark.parametrize("name", ["chat", *deep("llama", "peft")])
def test_an_error_leaves_nothing_even_while_it_is_looked_at(name: str) -> None:
    engine = hybrid_fx.hybridize(MODELS[name](), release_inference_cache=True)
    engine.generate(**CALL)
    engine.train()
    engine._graphs.ready()
    prepared = engine._graphs.runner.prepared.nbytes
    engine._graphs.release()
    with without_collector():
        before = live_bytes()
        with pytest.raises(LookupError) as held:
            engine.generate(**CALL, logits_processor=[odd])
        # The frames of the error hold a step's ids and logits, not what was prepared.
        assert live_bytes() - before < prepared / 4
        held.value.__traceback__ = None
        del held
        assert live_bytes() == before
    engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_remains_on_a_gpu() -> None:
    with hybrid_fx.hybridize(tiny("llama").cuda(), release_inference_cache=True) as engine:
        for call in ROUTES.values():
            given = {n: v.cuda() if hasattr(v, "cuda") else v for n, v in call.items()}
            engine.generate(**given)  # the libraries' own workspaces
            engine.train()
            before = torch.cuda.memory_allocated()
            engine.generate(**given)
            engine.train()
            assert torch.cuda.memory_allocated() == before


def test_the_lists_that_graphs_were_given_are_emptied() -> None:
    """An error inside a graph is looked at with the graph's own arguments in its frames."""
    with hybrid_fx.hybridize(tiny("llama")) as engine:
        engine.generate(**CALL)
        runner = engine._graphs.runner
        given = (runner.prepared.tensors, runner.workspace.keys, runner.workspace.values)
        assert all(given)
        engine._graphs.release()
        assert given == ([], [], [])
