"""Ways to change the structure of a tiny Llama with an adapter, one for each field of the key."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers.models.llama.modeling_llama as modeling
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

Change = Callable[[Any, pytest.MonkeyPatch], object]


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def adapted_llama(seed: int = 0) -> peft.PeftModel:
    options = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(seed), options)
    model.add_adapter("other", options)
    return model.eval()


def layer(model: nn.Module) -> Any:
    """The first decoder layer."""
    return next(m for m in model.modules() if isinstance(m, modeling.LlamaDecoderLayer))


def adapter_of(model: nn.Module) -> Any:
    """The first adapted projection."""
    return layer(model).self_attn.q_proj


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Steering:
    """A hook that is an object."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output * self.strength


def scaled_forward(factor: float) -> Callable[..., Any]:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x * factor

    return forward


def plain_hook(module: nn.Module, args: Any) -> None:
    return None


def set_instance(target: nn.Module, name: str, function: Callable[..., Any]) -> None:
    setattr(target, name, types.MethodType(function, target))


# Field of the key -> a change that the field must show.
FIELDS: dict[str, Change] = {
    "modules": lambda m, _: setattr(layer(m).mlp, "act_fn", nn.ReLU()),
    "classes": lambda m, p: p.setattr(modeling.LlamaAttention, "forward", scaled_forward(2.0)),
    "helpers": lambda m, p: p.setattr(
        modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: (q, k)
    ),
    "overrides": lambda m, _: set_instance(layer(m).self_attn, "forward", scaled_forward(2.0)),
    "attributes": lambda m, _: setattr(layer(m).self_attn, "scaling", 0.25),
    "config": lambda m, _: setattr(m.config, "rms_norm_eps", 1e-3),
    "hooks": lambda m, _: layer(m).register_forward_pre_hook(plain_hook),
    "own": lambda m, _: layer(m).register_forward_pre_hook(plain_hook),
    "tensors": lambda m, _: layer(m).mlp.to(torch.bfloat16),
    "parametrizations": lambda m, _: parametrize.register_parametrization(
        layer(m).mlp.up_proj, "weight", Doubled()
    ),
    "adapters": lambda m, _: adapter_of(m).set_scale("default", 0.5),
    "modes": lambda m, _: layer(m).train(),
}

# More that must not be missed: name -> (field, change).
MORE: dict[str, tuple[str, Change]] = {
    "a method other than forward": (
        "classes",
        lambda m, p: p.setattr(modeling.LlamaRMSNorm, "extra_repr", lambda self: "patched"),
    ),
    "a method of a base class": (
        "classes",
        lambda m, p: p.setattr(nn.Linear, "forward", scaled_forward(2.0)),
    ),
    "a helper on the instance": (
        "overrides",
        lambda m, _: set_instance(layer(m).self_attn, "helper", scaled_forward(2.0)),
    ),
    "an activation function": (
        "overrides",
        lambda m, _: setattr(layer(m).mlp, "gate", torch.nn.functional.silu),
    ),
    "a helper that a helper calls": (
        "helpers",
        lambda m, p: p.setattr(modeling, "rotate_half", lambda x: x),
    ),
    "a helper imported from elsewhere": (
        "helpers",
        lambda m, p: p.setattr(modeling, "create_causal_mask", lambda *a, **k: None),
    ),
    "a helper's default": (
        "helpers",
        lambda m, p: p.setattr(modeling.apply_rotary_pos_emb, "__defaults__", (2,)),
    ),
    "a helper's code": (
        "helpers",
        lambda m, p: p.setattr(modeling.rotate_half, "__code__", (lambda x: x).__code__),
    ),
    "a hook that is an object": (
        "hooks",
        lambda m, _: layer(m).register_forward_hook(Steering(2.0)),
    ),
    "a hook on a lone parameterless module": (
        "hooks",
        lambda m, _: layer(m).mlp.act_fn.register_forward_hook(Steering(2.0)),
    ),
    "attention implementation": (
        "config",
        lambda m, _: m.get_base_model().set_attn_implementation("eager"),
    ),
    "a new attribute": ("attributes", lambda m, _: setattr(layer(m), "window", (4, 4))),
    "a number in a dict": (
        "attributes",
        lambda m, _: setattr(layer(m), "table", {"scale": [1.0, 2.0]}),
    ),
    "an int that became a float": (
        "attributes",
        lambda m, _: setattr(layer(m).self_attn, "num_key_value_groups", 2.0),
    ),
    "a dtype attribute": (
        "attributes",
        lambda m, _: setattr(layer(m), "compute_dtype", torch.float16),
    ),
    "resized embeddings": ("tensors", lambda m, _: m.resize_token_embeddings(40)),
    "a new tie": (
        "tensors",
        lambda m, _: setattr(layer(m).mlp.up_proj, "weight", layer(m).mlp.gate_proj.weight),
    ),
    "a new buffer": (
        "tensors",
        lambda m, _: layer(m).register_buffer("extra", torch.ones(2), persistent=False),
    ),
    "a module shared by two paths": (
        "modules",
        lambda m, _: setattr(layer(m), "input_layernorm", layer(m).post_attention_layernorm),
    ),
    "an adapter added": (
        "adapters",
        lambda m, _: m.add_adapter("third", peft.LoraConfig(r=2, target_modules=["q_proj"])),
    ),
    "an adapter deleted": ("adapters", lambda m, _: m.delete_adapter("other")),
    "the active adapter": ("adapters", lambda m, _: m.set_adapter("other")),
    "merged": ("adapters", lambda m, _: m.merge_adapter()),
    "disabled": ("adapters", lambda m, _: m.base_model.disable_adapter_layers()),
    "rank": ("adapters", lambda m, _: adapter_of(m).r.update(default=4)),
}
