"""The model: a small Llama with random weights, or any causal LM of the Hugging Face hub."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

DROPOUT_RATES = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")


def small_llama(*, hidden: int, layers: int) -> tuple[nn.Module, Any]:
    """Return a decoder over bytes with random weights, and its tokenizer (which needs no files)."""
    tokenizer = ByT5Tokenizer(padding_side="left")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def load_model(name: str) -> tuple[nn.Module, Any]:
    """Return the causal LM ``name`` (a path, or a name on the hub) and its tokenizer.

    Raises:
        OSError, ValueError: as transformers raises them, where there is no such model; where its
            tokenizer cannot write the task.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if not tokenizer.encode("17+25=", add_special_tokens=False):
        raise ValueError(f"the tokenizer of {name} makes no tokens of '17+25='")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    disable_dropout(model)
    return model, tokenizer


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to zero: with dropout the training forward is another policy."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPOUT_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def add_lora(model: Any, *, rank: int = 16) -> Any:
    """Return ``model`` as a PeftModel with a LoRA adapter on every linear layer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def takes_positions(model: Any) -> bool:
    """Return whether the model's forward has ``position_ids`` (ALiBi models have none)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(base.forward).parameters


def end_ids(model: Any, tokenizer: Any, *, newline: bool) -> tuple[int, ...]:
    """Return the ids that end a completion: the model's (there may be several), or the tokenizer's.

    Args:
        newline: Let the end of a line end it too; a base model writes on otherwise.
    """
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    ends = list(ids) if isinstance(ids, list | tuple) else [int(ids)]
    if newline:
        ends += tokenizer.encode("\n", add_special_tokens=False)[-1:]
    return tuple(ends)
