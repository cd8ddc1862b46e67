"""Tiny causal language models with random weights, and prompts for them.

Every parameter is random, biases, norms and LoRA factors included: zeros and ones hide errors.
Legend: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 64
PAD = 0
POSITIONS = 128

_GATED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_head": 4, "n_positions": POSITIONS}

#: Kind -> (prefix of the transformers classes, fields of the config).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GATED),
    "qwen2": ("Qwen2", {**_GATED, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", _GPT2),
    "opt": ("OPT", _OPT),
    "opt350": ("OPT", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "mistral": ("Mistral", {**_GATED, "sliding_window": 4}),
    "qwen3": ("Qwen3", {**_GATED, "head_dim": 8}),
    "phi3": ("Phi3", _GATED),
    "gemma2": ("Gemma2", {**_GATED, "head_dim": 8, "sliding_window": 4}),
    "olmo2": ("Olmo2", _GATED),
    "stablelm": ("StableLm", {**_GATED, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2", _GATED),
    "neox": ("GPTNeoX", {k: v for k, v in _GATED.items() if k != "num_key_value_heads"}),
    "qwen2moe": ("Qwen2Moe", {**_GATED, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3moe": ("Qwen3Moe", {**_GATED, **_EXPERTS, "head_dim": 8}),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_head": 4}),
}
#: Four families that stand for the others, OPT in both its shapes.
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "opt350")

_LAYERS = {"gpt2": "n_layer", "bloom": "n_layer"}


def tiny(
    kind: str,
    seed: int = 0,
    *,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """A tiny model of one of :data:`KINDS` in eval, its config changed by ``changes``."""
    prefix, fields = KINDS[kind]
    depth = {_LAYERS.get(kind, "num_hidden_layers"): layers}
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
    config = getattr(transformers, f"{prefix}Config")(**{**fields, **depth, **ids, **changes})
    head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, prefix + head)(config)
    reweigh(model, seed)
    return model.to(dtype).eval()


def reweigh(model: nn.Module, seed: int) -> None:
    """Write every parameter anew, in place: matrices of gain 0.5, vectors near their start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.dim() == 1:
                start = 1.0 if "norm" in name or "ln_" in name else 0.0
                parameter.copy_(start + 0.1 * noise if name.endswith("weight") else 0.1 * noise)
            else:
                parameter.copy_(0.5 * noise / parameter.shape[-1] ** 0.5)


def adapted(model: nn.Module, seed: int = 7, **options: Any) -> Any:
    """``model`` under a LoRA adapter of rank 4 whose factors are all random, in eval.

    PEFT keeps factors in float32 over bfloat16 weights; ``autocast_adapter_dtype=False`` does not.
    """
    import peft

    autocast = options.pop("autocast_adapter_dtype", True)

    given = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, **options}
    if type(model).__name__.startswith("GPT2"):
        given.setdefault("fan_in_fan_out", True)
    config = peft.LoraConfig(**given)
    peft_model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
    randomize_adapters(peft_model, seed)
    return peft_model.eval()


def randomize_adapters(model: nn.Module, seed: int, size: float = 0.1) -> None:
    """Write every LoRA factor anew, in place."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * size)


def prompt(lengths: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """Random rows of these lengths, padded on the left: ids and mask, int64 ``[B, T]``."""
    rng = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, VOCAB, (length,), generator=rng)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}
