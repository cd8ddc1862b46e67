"""What calls write and share, also where they are not of the operator table."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hybrid_fx.passes.effects import is_opaque, shared_with, writes, written_memory
from hybrid_fx.passes.operators import OPERATORS


@torch.library.custom_op("hybrid_fx_effects::pure", mutates_args=())
def pure(x: Tensor) -> Tensor:
    """Reads its argument."""
    return x.clone()


@torch.library.custom_op("hybrid_fx_effects::filled", mutates_args=("x",))
def filled(x: Tensor) -> None:
    """Writes its argument."""
    x.fill_(0.0)


def unheard_of(x: Tensor, y: Tensor) -> Tensor:
    """Nobody knows what it does."""
    return x


PURE, FILLED = torch.ops.hybrid_fx_effects.pure, torch.ops.hybrid_fx_effects.filled


def _call(target: Any, *rest: Any, **kwargs: Any) -> tuple[fx.Graph, fx.Node, fx.Node, fx.Node]:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    make: Callable[..., fx.Node] = graph.call_method if isinstance(target, str) else None  # type: ignore[assignment]
    node = (make or graph.call_function)(target, (x, y, *rest), kwargs)
    graph.output(node)
    return graph, x, y, node


@pytest.mark.parametrize(
    ("target", "rest", "kwargs", "written"),
    [
        (operator.add, (), {}, ""),
        (operator.iadd, (), {}, "x"),
        (operator.setitem, (1.0,), {}, "x"),
        ("add_", (), {}, "x"),
        ("index_copy_", (), {}, "x"),
        ("masked_fill", (), {}, ""),
        ("__add__", (), {}, ""),
        (torch.add, (), {"out": None}, ""),
        (OPERATORS["add_"], (), {}, "x"),
        (F.relu, (), {"inplace": True}, "x"),
        (F.embedding, (None, 1.0), {}, "xy"),
        (F.embedding, (None, None), {}, ""),
        (F.batch_norm, (None, None, None, True), {}, "xy"),
        (torch.atan2, (), {}, ""),
        (torch.relu_, (), {}, "x"),
        (PURE, (), {}, ""),
        (PURE.default, (), {}, ""),
        (FILLED, (), {}, "xy"),
        (FILLED.default, (), {}, "xy"),
        (unheard_of, (), {}, "xy"),
        (torch._C._log_api_usage_once, (), {}, ""),
    ],
)
def test_the_arguments_a_call_writes(
    target: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], written: str
) -> None:
    _, x, y, node = _call(target, *rest, **kwargs)
    assert writes(node) == [value for name, value in (("x", x), ("y", y)) if name in written]


@pytest.mark.parametrize(
    ("target", "opaque"),
    [
        (operator.add, False),
        (getattr, False),
        (F.relu, False),
        (torch.atan2, False),
        ("anything", False),
        (PURE, False),
        (FILLED.default, False),
        (torch._C._log_api_usage_once, False),
        (unheard_of, True),
        (torch._C._set_grad_enabled, True),
        (torch.amp.autocast_mode._enter_autocast, True),
        (torch.ops.higher_order.tag_activation_checkpoint, True),
        (print, True),
    ],
)
def test_a_call_of_which_nothing_is_known_is_opaque(target: Any, opaque: bool) -> None:
    assert is_opaque(_call(target)[3]) == opaque


@pytest.mark.parametrize(
    ("target", "shared"),
    [
        (OPERATORS["view"], "x"),
        (OPERATORS["add"], ""),
        (OPERATORS["add_"], "x"),
        (OPERATORS["einsum"], "xy"),
        ("view", "xy"),
        (torch.atan2, "xy"),
        (unheard_of, "xy"),
    ],
)
def test_a_result_may_share_the_memory_of(target: Any, shared: str) -> None:
    _, x, y, node = _call(target)
    assert shared_with(node) == [v for name, v in (("x", x), ("y", y)) if name in shared]


def test_what_an_unknown_function_was_given_and_gave_may_be_written_under_every_name() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    view = graph.call_function(OPERATORS["view"], (x, (1, -1)))
    total = graph.call_function(operator.add, (x, y))
    unknown = graph.call_function(unheard_of, (view, 2))
    later = graph.call_function(OPERATORS["transpose"], (unknown, 0, 1))
    graph.output((total, later))
    assert written_memory(graph) == {x, y, view, unknown, later}  # x and y may be one tensor
