"""The decoder families, as data. Adding a family is adding a file and its name here."""

from ..roles import LayerMatch, Policy, Role, find_role, match_layer
from .gemma import GEMMA
from .gpt2 import GPT2
from .llama import LLAMA
from .mixture import MIXTURE, MIXTURE_SHARED
from .olmo2 import OLMO2
from .opt import OPT
from .phi3 import PHI3
from .qwen2 import QWEN2
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

#: Tried in this order; the first that fits a layer in full is taken.
POLICIES: tuple[Policy, ...] = (
    QWEN2,
    LLAMA,
    MIXTURE_SHARED,
    MIXTURE,
    PHI3,
    GPT2,
    OPT,
    GEMMA,
    OLMO2,
    STABLELM,
    STARCODER2,
)

__all__ = ["POLICIES", "LayerMatch", "Policy", "Role", "find_role", "match_layer"]
