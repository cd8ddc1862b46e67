"""Gemma, Gemma 2 and 3: Llama's layer with the tanh form of GELU. Norms add 1 to their weight, and
the later ones stand behind each half too."""

from dataclasses import replace

from .llama import LLAMA
from .patterns import gated_mlp

GEMMA = replace(
    LLAMA,
    name="gemma",
    roles=tuple(
        replace(role, pattern=gated_mlp("gelu_tanh")) if role.name == "mlp" else role
        for role in LLAMA.roles
    ),
)
