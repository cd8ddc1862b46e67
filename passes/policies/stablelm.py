"""StableLM, OLMo: Llama's layer with LayerNorm."""

from dataclasses import replace

from .llama import LLAMA
from .patterns import LAYER_NORM

STABLELM = replace(
    LLAMA,
    name="stablelm",
    roles=tuple(
        replace(role, pattern=LAYER_NORM) if role.name == "norm" else role for role in LLAMA.roles
    ),
)
