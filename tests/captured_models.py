"""Tiny decoders and their graphs, captured once a test run; graphs are handed out as copies."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from chat_lora import chat_adapted
from tiny_models import POSITIONS, VOCAB, adapted, reweigh, tiny
from torch import fx

from hybrid_fx.capture import capture
from hybrid_fx.passes.pipeline import copy_graph
from hybrid_fx.plan.build import normalize

_PLAIN = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}


def decoder(kind: str, **changes: Any) -> Any:
    """A tiny decoder: those of :mod:`tiny_models` and Gemma-3."""
    if kind != "gemma3":
        return tiny(kind, **changes)
    fields = {**_PLAIN, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    config = transformers.Gemma3TextConfig(**{**fields, "num_hidden_layers": 6, **changes})
    model: Any = transformers.Gemma3ForCausalLM(config)
    reweigh(model, 0)
    return model.eval()


@functools.cache
def captured(kind: str, lora: str = "") -> tuple[Any, fx.Graph]:
    """A tiny decoder and its graph as captured in eval; neither may be changed.

    ``lora`` puts an adapter on it: ``"plain"``, ``"rs"`` or ``"dora"`` of PEFT, or ``"chat"``.
    """
    model = decoder(kind)
    if lora == "chat":
        model = chat_adapted(model)
    elif lora:
        model = adapted(model, use_dora=lora == "dora", use_rslora=lora == "rs")
    return model, capture(model).graph


@functools.cache
def _normalized(kind: str, lora: str) -> fx.Graph:
    return normalize(copy_graph(captured(kind, lora)[1]))


def canonical(kind: str, lora: str = "") -> fx.Graph:
    """The canonical graph of a tiny decoder, a copy of the caller's own."""
    return copy_graph(_normalized(kind, lora))


def model_of(kind: str, lora: str = "") -> Any:
    """The decoder behind :func:`canonical`."""
    return captured(kind, lora)[0]
