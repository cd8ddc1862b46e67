"""Mixtures of experts with Llama's attention: Mixtral, Qwen2-MoE and Qwen3-MoE, OLMoE. A layer of
theirs without experts is Llama's."""

from ..roles import Policy, Role
from .llama import LLAMA
from .patterns import EXPERTS

_SHARED = ("norm", "q", "k", "v", "rotary", "output")

MIXTURE = Policy(
    name="mixture",
    roles=(
        *(role for role in LLAMA.roles if role.name in _SHARED),
        Role(name="experts", pattern=EXPERTS, at=("mlp.experts",), count=2),
    ),
)
