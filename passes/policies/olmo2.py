"""OLMo 2 and 3: Llama's layer with its norms behind each half."""

from dataclasses import replace

from .llama import LLAMA

_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    roles=tuple(replace(role, at=_BEHIND) if role.name == "norm" else role for role in LLAMA.roles),
)
