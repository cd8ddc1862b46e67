"""A user's own code in a forward acts as in the module: by its state as it is, at every step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from laws.against_hf import hf_generate, same_tokens
from tiny_models import prompt, tiny
from torch import Tensor, nn

import hybrid_fx

CALL = prompt([7, 4, 6]) | {"max_new_tokens": 8, "do_sample": False}
SETTINGS: dict[str, Any] = {"steps": [1.0]}


class Own:
    """What a script keeps its settings in."""

    strength = 1.0

    def __init__(self) -> None:
        self.inner = {"strength": 1.0}
        self.calls = 0


OWN = Own()


def hybridized(kind: str = "llama") -> Any:
    return hybrid_fx.hybridize(tiny(kind, 3), disk_cache=False)


def hook(engine: Any, function: Callable[..., Any]) -> None:
    engine.module.model.layers[0].register_forward_hook(function)


def at_prompts(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * -1.7 if out.shape[1] > 1 else out


def at_tokens(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * -1.7 if out.shape[1] == 1 else out


def at_one_row(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * -1.7 if len(out) == 1 else out


def at_long_prompts(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * -1.7 if out.shape[1] > 11 else out


def at_even_rows(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * -1.7 if len(out) % 2 else out


@pytest.mark.parametrize(
    "function", [at_prompts, at_tokens, at_one_row, at_long_prompts, at_even_rows]
)
def test_a_hook_that_looks_at_sizes_gives_the_tokens_of_transformers(function: Any) -> None:
    engine = hybridized()
    hook(engine, function)
    for lengths in ([7, 4, 6], [5], [14, 3], [13, 12, 14, 15], [1]):
        same_tokens(engine, **prompt(lengths), max_new_tokens=6, do_sample=False)


class Branching(nn.Module):
    """A wrapper of a user's around a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Any:
        return self.inner(hidden * 1.7 if hidden.shape[1] > 1 else hidden)


def test_a_module_that_tells_a_prompt_from_a_token_does_so_here_too() -> None:
    engine = hybridized()
    layer = engine.module.model.layers[0]
    layer.mlp = Branching(layer.mlp)
    same_tokens(engine, **CALL)
    assert "do not reproduce it" in next(iter(engine.stats.fallbacks))


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


@pytest.mark.parametrize(
    "place", [closed_over, in_a_namespace, in_a_global, in_an_object, in_a_class]
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


def test_a_hook_that_counts_its_calls_counts_them() -> None:
    engine = hybridized()
    own = Own()

    def count(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        own.calls += 1
        return out * 2 if own.calls > 4 else out

    hook(engine, count)
    want = hf_generate(engine.module, **CALL)
    calls, own.calls = own.calls, 0
    assert engine.generate(**CALL).tolist() == want.tolist()
    assert own.calls == calls
    assert "changes a Python object" in next(iter(engine.stats.fallbacks))


def test_models_that_are_captured_in_threads_of_their_own_are_all_captured() -> None:
    engines = [hybridized(kind) for kind in ("llama", "qwen3", "mistral")]
    barrier = threading.Barrier(len(engines))

    def run(engine: Any) -> None:
        barrier.wait()
        engine.generate(**CALL)

    threads = [threading.Thread(target=run, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [dict(engine.stats.fallbacks) for engine in engines] == [{}] * len(engines)
