"""The decoder families, as data. Adding a family is adding a file and its name here."""

from ..roles import LayerMatch, Policy, Role, find_role, match_layer
from .gpt2 import GPT2
from .llama import LLAMA
from .opt import OPT
from .phi3 import PHI3
from .qwen2 import QWEN2

#: Tried in this order; the first that fits a layer in full is taken.
POLICIES: tuple[Policy, ...] = (QWEN2, LLAMA, PHI3, GPT2, OPT)

__all__ = ["POLICIES", "LayerMatch", "Policy", "Role", "find_role", "match_layer"]
