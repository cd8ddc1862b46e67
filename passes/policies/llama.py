"""Llama, and what is built like it: Qwen2 and Qwen3, Mistral. RMSNorm before each half, rotary
positions, separate q, k, v with or without bias, gated SiLU MLP."""

from ..roles import Policy, Role
from .patterns import OUTPUT, RMS_NORM, ROTARY, gated_mlp, linear

LLAMA = Policy(
    name="llama",
    roles=(
        Role(
            name="norm",
            pattern=RMS_NORM,
            at=("input_layernorm", "post_attention_layernorm"),
            count=2,
        ),
        Role(name="q", pattern=linear(), at=("self_attn.q_proj",)),
        Role(name="k", pattern=linear(), at=("self_attn.k_proj",)),
        Role(name="v", pattern=linear(), at=("self_attn.v_proj",)),
        Role(name="rotary", pattern=ROTARY, at=("self_attn",), count=2),
        Role(name="output", pattern=OUTPUT, at=("self_attn.o_proj",)),
        Role(name="gate", pattern=linear(), at=("mlp.gate_proj",)),
        Role(name="up", pattern=linear(), at=("mlp.up_proj",)),
        Role(name="mlp", pattern=gated_mlp("silu"), at=("mlp",)),
    ),
)
