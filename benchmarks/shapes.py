"""Models of real shapes with random weights: speed does not depend on the values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)


def _q05(layers: int) -> PretrainedConfig:
    """Qwen2-0.5B, or fewer layers of it."""
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    # For tests of the benchmarks, where nothing is timed, and for a quick look.
    "tiny": lambda: Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "small": lambda: Qwen2Config(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llama-110m": lambda: LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "qwen2-110m": lambda: Qwen2Config(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "gpt2-124m": lambda: GPT2Config(),
    "opt-125m": lambda: OPTConfig(
        hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "q05": lambda: _q05(layers=24),
    "q05-12": lambda: _q05(layers=12),
    "l1b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
}


def build(
    name: str, *, dtype: torch.dtype, device: str, layers: int | None = None
) -> torch.nn.Module:
    """A model of shape ``name``, of so many layers; the same weights every time."""
    torch.manual_seed(0)
    config = SHAPES[name]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(device).eval()
