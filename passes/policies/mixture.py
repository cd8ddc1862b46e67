"""Mixtures of experts with Llama's attention: Mixtral, Qwen2-MoE and Qwen3-MoE, OLMoE, GLM-4 MoE.

With or without an MLP that all tokens share; a layer of theirs without experts is Llama's.
"""

from dataclasses import replace

from ..roles import Policy, Role
from .llama import LLAMA
from .patterns import EXPERTS, gated_mlp, linear

_ATTENTION = ("norm", "q", "k", "v", "rotary", "output")
_SHARED = ("mlp.shared_expert", "mlp.shared_experts")

MIXTURE = Policy(
    name="mixture",
    roles=(
        *(role for role in LLAMA.roles if role.name in _ATTENTION),
        Role(name="experts", pattern=EXPERTS, at=("mlp.experts",), count=2),
    ),
)

#: Tried before the other: what is shared is fused as Llama's MLP is.
MIXTURE_SHARED = replace(
    MIXTURE,
    name="mixture_shared",
    roles=(
        *MIXTURE.roles,
        Role(name="gate", pattern=linear(), at=tuple(f"{at}.gate_proj" for at in _SHARED)),
        Role(name="up", pattern=linear(), at=tuple(f"{at}.up_proj" for at in _SHARED)),
        Role(name="mlp", pattern=gated_mlp("silu"), at=_SHARED),
    ),
)
