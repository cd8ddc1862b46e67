"""Qwen2: Llama's roles, with biases on q, k and v."""

from dataclasses import replace

from ..roles import Role
from .llama import LLAMA
from .patterns import linear

_BIASED = linear(biased=True)

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    roles=tuple(
        Role(name=role.name, pattern=_BIASED, at=role.at) if role.name in "qkv" else role
        for role in LLAMA.roles
    ),
)
