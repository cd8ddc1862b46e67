"""What code of a user's reads is followed as it is at each generate, wherever it is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from laws import settings_of_a_user
from laws.against_hf import same_tokens
from laws.settings_of_a_user import scaled
from laws.user_code import CALL, hook, hybridized
from tiny_models import tiny
from torch import Tensor, nn

import hybrid_fx

SETTINGS: dict[str, Any] = {"steps": [1.0]}


class Own:
    """What a script keeps its settings in."""

    strength = 1.0

    def __init__(self) -> None:
        self.inner = {"strength": 1.0}
        self.calls = 0

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        """As a forward hook."""
        return out * self.scale

    @property
    def scale(self) -> float:
        """By how much."""
        return self.inner["strength"]


OWN = Own()


OWN = Own()


def closed_over() -> tuple[Callable[..., Any], Callable[[float], None]]:
    kept = {"strengths": [1.0]}

    def change(value: float) -> None:
        kept["strengths"][0] = value

    return lambda module, args, out: out * kept["strengths"][0], change


def in_a_namespace() -> tuple[Callable[..., Any], Callable[[float], None]]:
    space = SimpleNamespace(hook=SimpleNamespace(strength=1.0))

    def change(value: float) -> None:
        space.hook.strength = value

    return lambda module, args, out: out * space.hook.strength, change


def in_a_global() -> tuple[Callable[..., Any], Callable[[float], None]]:
    def change(value: float) -> None:
        SETTINGS["steps"][0] = value

    return lambda module, args, out: out * SETTINGS["steps"][0], change


def in_an_object() -> tuple[Callable[..., Any], Callable[[float], None]]:
    def change(value: float) -> None:
        OWN.inner["strength"] = value

    return lambda module, args, out: out * OWN.inner["strength"], change


def in_a_class() -> tuple[Callable[..., Any], Callable[[float], None]]:
    def change(value: float) -> None:
        Own.strength = value

    return lambda module, args, out: out * Own.strength, change


def deep_in_a_closure() -> tuple[Callable[..., Any], Callable[[float], None]]:
    kept = {"a": {"b": [{"c": {"d": 1.0}}]}}

    def change(value: float) -> None:
        kept["a"]["b"][0]["c"]["d"] = value

    return lambda module, args, out: out * kept["a"]["b"][0]["c"]["d"], change


def in_a_default() -> tuple[Callable[..., Any], Callable[[float], None]]:
    kept = {"strength": 1.0}

    def hook(module: nn.Module, args: Any, out: Tensor, kept: Any = kept) -> Tensor:
        return out * kept["strength"]

    def change(value: float) -> None:
        kept["strength"] = value

    return hook, change


def in_an_argument() -> tuple[Callable[..., Any], Callable[[float], None]]:
    kept = SimpleNamespace(strength=1.0)

    def hook(kept: Any, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * kept.strength

    def change(value: float) -> None:
        kept.strength = value

    return functools.partial(hook, kept), change


def in_a_module() -> tuple[Callable[..., Any], Callable[[float], None]]:
    steer: Any = nn.Identity()
    steer.inner = nn.Identity()

    def change(value: float) -> None:
        steer.inner.strength = value

    return lambda module, args, out: out * steer.inner.strength, change


def by_a_method() -> tuple[Callable[..., Any], Callable[[float], None]]:
    own = Own()

    def change(value: float) -> None:
        own.inner["strength"] = value
        own.calls += 1  # which the method does not read

    return own.hook, change


def in_another_file() -> tuple[Callable[..., Any], Callable[[float], None]]:
    def change(value: float) -> None:
        settings_of_a_user.SETTINGS["strength"] = value

    return lambda module, args, out: scaled(out), change


def on_a_function() -> tuple[Callable[..., Any], Callable[[float], None]]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * hook.strength  # type: ignore[attr-defined]

    def change(value: float) -> None:
        hook.strength = value  # type: ignore[attr-defined]

    return hook, change


def in_a_range() -> tuple[Callable[..., Any], Callable[[float], None]]:
    kept = SimpleNamespace(part=range(1))

    def change(value: float) -> None:
        kept.part = range(1 if value > 0 else 2)

    return lambda module, args, out: out * (1.0 - 1.5 * (1 in kept.part)), change


@pytest.mark.parametrize(
    "place",
    [
        on_a_function,
        in_a_range,
        closed_over,
        deep_in_a_closure,
        in_a_default,
        in_an_argument,
        in_a_namespace,
        in_a_global,
        in_an_object,
        in_a_class,
        in_a_module,
        by_a_method,
        in_another_file,
    ],
)
def test_what_a_hook_reads_is_followed_wherever_it_is_kept(place: Any) -> None:
    engine = hybridized()
    function, change = place()
    change(1.0)
    hook(engine, function)
    same_tokens(engine, **CALL)
    change(-2.0)
    same_tokens(engine, **CALL)
    captures = engine.stats.counters["captures"]
    same_tokens(engine, **CALL)
    assert engine.stats.counters["captures"] == captures, "and without a change, no work"
    assert not engine.stats.fallbacks


def test_what_the_owner_of_a_hook_counts_beside_it_costs_no_capture() -> None:
    engine = hybridized()
    own = Own()
    hook(engine, own.hook)
    for _ in range(3):
        own.calls += 1
        same_tokens(engine, **CALL)
    assert engine.stats.counters["captures"] == 1


def test_settings_on_a_librarys_module_are_followed() -> None:
    engine = hybridized()
    engine.module.model.layers[0].mlp.steer = SimpleNamespace(gains={"strength": [1.0]})
    hook(engine, lambda module, args, out: out * module.mlp.steer.gains["strength"][0])
    for value in (1.0, -2.0):
        engine.module.model.layers[0].mlp.steer.gains["strength"][0] = value
        same_tokens(engine, **CALL)
    assert not engine.stats.fallbacks


def test_code_that_may_read_too_much_runs_as_the_module_and_says_so() -> None:
    engine = hybridized()
    data = [[0.5] * 1000 for _ in range(101)]
    hook(engine, lambda module, args, out: out * data[3][4])
    for _ in range(2):
        same_tokens(engine, **CALL)
    assert "more than 100000 values" in next(iter(engine.stats.fallbacks))


def test_a_training_graph_of_what_cannot_be_read_runs_the_module() -> None:
    model = tiny("llama", 3).train()
    data = [[0.5] * 1000 for _ in range(101)]
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * data[3][4])
    engine: Any = hybrid_fx.hybridize(model, disk_cache=False, train_graph=True)
    ids = CALL["input_ids"]
    engine(input_ids=ids, labels=ids).loss.backward()
    assert "more than 100000 values" in next(iter(engine.stats.fallbacks))
