"""Qwen2: Llama's roles, with biases on q, k and v."""

from dataclasses import replace

from .llama import LLAMA
from .patterns import linear
from ..roles import Role

_BIASED = linear(biased=True)

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    roles=tuple(
        Role(name=role.name, pattern=_BIASED, at=role.at) if role.name in "qkv" else role
        for role in LLAMA.roles
    ),
)
