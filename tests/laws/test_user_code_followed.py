"""A user's own code in a forward acts as in the module: by its state as it is, at every step."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws import settings_of_a_user
from laws.against_hf import hf_generate, same_tokens
from laws.settings_of_a_user import scaled
from tiny_models import VOCAB, prompt, tiny
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import hybrid_fx

CALL = prompt([7, 4, 6]) | {"max_new_tokens": 8, "do_sample": False}
SETTINGS: dict[str, Any] = {"steps": [1.0]}
KEPT: list[Any] = []


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


def at_tokens_in_a_class(engine: Any, patch: pytest.MonkeyPatch) -> None:
    plain = modeling_llama.LlamaMLP.forward

    def forward(self: nn.Module, x: Tensor) -> Any:
        return plain(self, x) * (-1.7 if x.shape[1] == 1 else 1.0)

    patch.setattr(modeling_llama.LlamaMLP, "forward", forward)


def at_tokens_on_an_instance(engine: Any, patch: pytest.MonkeyPatch) -> None:
    mlp = engine.module.model.layers[0].mlp
    del mlp.act_fn
    mlp.act_fn = lambda x: torch.relu(x) if x.shape[1] == 1 else torch.tanh(x)


def where_a_mask_is_given(engine: Any, patch: pytest.MonkeyPatch) -> None:
    def hook(module: nn.Module, args: Any, given: Any, out: Any) -> Any:
        if given.get("attention_mask") is not None:
            out.logits = -out.logits
        return out

    engine.module.register_forward_hook(hook, with_kwargs=True)


def where_padding_is_seen(engine: Any, patch: pytest.MonkeyPatch) -> None:
    def hook(module: nn.Module, args: Any, given: Any) -> Any:
        return args, {**given, "attention_mask": None}

    for layer in engine.module.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def where_a_cache_is_long(engine: Any, patch: pytest.MonkeyPatch) -> None:
    def hook(module: nn.Module, args: Any, given: Any, out: Any) -> Any:
        cache = given.get("past_key_values")
        long = cache is not None and cache.get_seq_length() > 11
        return (out[0] * -1.7, *out[1:]) if long else out

    engine.module.model.layers[0].self_attn.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    "place",
    [
        at_tokens_in_a_class,
        at_tokens_on_an_instance,
        where_a_mask_is_given,
        where_padding_is_seen,
        where_a_cache_is_long,
    ],
)
def test_what_only_generate_passes_is_tried(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = hybridized()
    place(engine, monkeypatch)
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


def test_what_the_owner_of_a_hook_counts_beside_it_costs_no_capture() -> None:
    engine = hybridized()
    own = Own()
    hook(engine, own.hook)
    for _ in range(3):
        own.calls += 1
        same_tokens(engine, **CALL)
    assert engine.stats.counters["captures"] == 1


def test_a_forward_that_closes_over_itself_is_read() -> None:
    engine = hybridized()
    layer = engine.module.model.layers[0]
    plain = layer.forward

    def forward(*args: Any, **given: Any) -> Any:
        return plain(*args, **given)

    forward.again = forward  # type: ignore[attr-defined]
    layer.forward = functools.partial(forward)
    layer.register_forward_hook(lambda module, args, out: out * len(KEPT[:1]))
    KEPT.append(layer.forward)
    same_tokens(engine, **CALL)
    assert not engine.stats.fallbacks


def test_code_that_may_read_too_much_runs_as_the_module_and_says_so() -> None:
    engine = hybridized()
    data = [[0.5] * 1000 for _ in range(101)]
    hook(engine, lambda module, args, out: out * data[3][4])
    for _ in range(2):
        same_tokens(engine, **CALL)
    assert "more than 100000 values" in next(iter(engine.stats.fallbacks))


def test_settings_on_a_librarys_module_are_followed() -> None:
    engine = hybridized()
    engine.module.model.layers[0].mlp.steer = SimpleNamespace(gains={"strength": [1.0]})
    hook(engine, lambda module, args, out: out * module.mlp.steer.gains["strength"][0])
    for value in (1.0, -2.0):
        engine.module.model.layers[0].mlp.steer.gains["strength"][0] = value
        same_tokens(engine, **CALL)
    assert not engine.stats.fallbacks


def test_tokens_that_a_hook_bans_do_not_keep_the_steps_from_being_tried() -> None:
    engine = hybridized()
    banned = torch.zeros(VOCAB)
    banned[7] = -torch.inf
    engine.module.lm_head.register_buffer("banned", banned)
    engine.module.lm_head.register_forward_hook(lambda module, args, out: out + module.banned)
    same_tokens(engine, **CALL)
    assert not engine.stats.fallbacks
    hook(engine, at_tokens)
    same_tokens(engine, **CALL)
    assert "do not reproduce it" in next(iter(engine.stats.fallbacks))


def test_a_training_graph_of_what_cannot_be_read_runs_the_module() -> None:
    model = tiny("llama", 3).train()
    data = [[0.5] * 1000 for _ in range(101)]
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * data[3][4])
    engine: Any = hybrid_fx.hybridize(model, disk_cache=False, train_graph=True)
    ids = CALL["input_ids"]
    engine(input_ids=ids, labels=ids).loss.backward()
    assert "more than 100000 values" in next(iter(engine.stats.fallbacks))
