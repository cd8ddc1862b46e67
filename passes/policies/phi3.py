"""Phi-3: Llama's layer with q, k and v as one weight, and gate and up as one weight."""

from ..roles import Policy, Role
from .llama import LLAMA
from .patterns import linear

_SHARED = ("norm", "rotary", "output", "mlp")

PHI3 = Policy(
    name="phi3",
    roles=(
        *(role for role in LLAMA.roles if role.name in _SHARED),
        Role(name="qkv", pattern=linear(), at=("self_attn.qkv_proj",)),
        Role(name="gate_up", pattern=linear(), at=("mlp.gate_up_proj",)),
    ),
)
