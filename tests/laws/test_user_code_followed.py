"""A user's own code in a forward acts as in the module, at every step and for every batch."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from laws.against_hf import hf_generate, same_tokens
from laws.user_code import CALL, hook, hybridized
from tiny_models import VOCAB, prompt
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from upstream_names import CACHE

KEPT: list[Any] = []


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
        cache = given.get(CACHE)
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


class Counts:
    calls = 0


def test_a_hook_that_counts_its_calls_counts_them() -> None:
    engine = hybridized()
    own = Counts()

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
