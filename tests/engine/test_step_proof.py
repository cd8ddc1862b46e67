"""Which code of a user's may ask for sizes, where ranks cannot try it step by step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import tiny
from torch import Tensor, nn

from hybrid_fx.cache.tree import View
from hybrid_fx.engine.prover import Prover
from hybrid_fx.engine.step_proof import may_ask_for_sizes


def branches(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * -1.7 if out.shape[1] == 1 else out


def by_a_helper(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return branches(module, args, out)


def scales(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2.0


def reshapes(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.view(out.shape)


@pytest.mark.parametrize(
    ("hook", "asks"),
    [(None, False), (branches, True), (by_a_helper, True), (scales, False), (reshapes, False)],
)
def test_a_hook_that_names_a_size_and_branches_may_ask(
    hook: Callable[..., Any] | None, asks: bool
) -> None:
    model = tiny("llama")
    if hook is not None:
        model.model.layers[0].register_forward_hook(hook)
    assert may_ask_for_sizes(model, View()) == asks


def test_ranks_that_hold_a_model_together_do_not_serve_a_hook_that_may_ask() -> None:
    model: Any = tiny("llama")
    model.model.layers[0].register_forward_hook(branches)
    source: Any = SimpleNamespace(collective=True, model=model, view=View())
    nobody: Any = None
    verdict = Prover(source, nobody, nobody, nobody).compare(nobody, {}, None)
    assert verdict.settled
    assert "asks for sizes" in verdict.difference
