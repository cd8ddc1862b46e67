"""Run one generate call by transformers and by hybrid_fx, and hold one against the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from generate.hf_runner import HFRunner, Watched
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
)
from upstream_names import CACHE

from hybrid_fx.generate import causal_lm, generate

VOCAB, PAD, EOS = 61, 0, 2
_IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
_GATED = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": (LlamaConfig, _GATED),
    "qwen2": (Qwen2Config, _GATED),
    "mistral": (MistralConfig, {**_GATED, "sliding_window": 4}),
    "phi3": (Phi3Config, _GATED),
    "gpt2": (
        GPT2Config,
        {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        | {"initializer_range": 0.3},
    ),
    "opt": (
        OPTConfig,
        {**_IDS, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32}
        | {"init_std": 0.3},
    ),
}
FAMILIES = ("llama", "qwen2", "gpt2", "opt")


@functools.cache
def shared_model(family: str = "llama", seed: int = 0) -> Any:
    """A tiny model; tests that change it take :func:`new_model`."""
    return new_model(family, seed)


def new_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    config_class, fields = CONFIGS[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config_class(**{**fields, **changes})).eval()


def prompt(lengths: tuple[int, ...], seed: int = 0, side: str = "left") -> dict[str, Tensor]:
    """Random rows of these lengths, padded on ``side``: ids and mask, ``[B, T]``."""
    rng = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(3, VOCAB, (length,), generator=rng)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Ran:
    """What one call by hybrid_fx did; ``module_calls`` counts calls of the causal LM module."""

    result: Any
    runner: Any
    fallbacks: list[str]
    module_calls: int


make_runtime: Callable[[Any], Any] = HFRunner  # conftest.py puts each runtime here in turn


def watched(model: Any) -> Watched:
    """A runner of the runtime under test, watched."""
    return Watched(make_runtime(causal_lm(model)))


def run(model: Any, *args: Any, runner: Any = "own", seed: int = 0, **kwargs: Any) -> Ran:
    """Generate by hybrid_fx, on a watched runner of its own unless one is given."""
    causal = causal_lm(model)
    runner = watched(model) if runner == "own" else runner
    fallbacks: list[str] = []
    calls = []
    hook = register_module_forward_hook(lambda m, *_: calls.append(m) if m is causal else None)
    torch.manual_seed(seed)
    try:
        result = generate(model, runner, args, kwargs, on_fallback=fallbacks.append)
    finally:
        hook.remove()
        assert "forward" not in vars(causal)
        assert "generate" not in vars(model)
        assert all(session.closed for session in getattr(runner, "sessions", ()))
    return Ran(result, runner, fallbacks, len(calls))


def same_as_hf(model: Any, *args: Any, make: Callable[[], dict] = dict, **kwargs: Any) -> Ran:
    """Generate both ways from one seed: same tokens, same scores, same random state after.

    Args:
        make: Makes the keyword arguments that keep state (streamers, processors), once a call.
    """
    seed = kwargs.pop("seed", 0)
    torch.manual_seed(seed)
    expected = model.generate(*args, **kwargs, **make())
    state = torch.get_rng_state()
    ran = run(model, *args, seed=seed, **kwargs, **make())
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(ran.result, expected)
    return ran


def assert_same(result: Any, expected: Any) -> None:
    """Equal tokens and fields; floats within 1e-4 (a prompt may be computed in other pieces)."""
    assert type(result) is type(expected)
    if isinstance(expected, Tensor):
        assert result.dtype == expected.dtype
        assert result.device == expected.device
        assert result.tolist() == expected.tolist()
        return
    assert list(result) == list(expected)
    for name in set(expected) - {CACHE}:
        if name in ("sequences", "beam_indices"):
            assert_same(result[name], expected[name])
        else:
            torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


def is_fast(ran: Ran) -> bool:
    """Our loop decoded, and the module was never called."""
    return ran.fallbacks == [] and ran.module_calls == 0 and len(ran.runner.sessions) == 1
