"""StarCoder2: LayerNorm before each half, rotary positions, separate q, k, v, plain MLP with the
tanh form of GELU."""

from ..roles import Policy, Role
from .llama import LLAMA
from .patterns import LAYER_NORM, linear, plain_mlp

_ATTENTION = tuple(role for role in LLAMA.roles if role.name in ("q", "k", "v", "rotary", "output"))

STARCODER2 = Policy(
    name="starcoder2",
    roles=(
        Role(
            name="norm",
            pattern=LAYER_NORM,
            at=("input_layernorm", "post_attention_layernorm"),
            count=2,
        ),
        *_ATTENTION,
        Role(name="up", pattern=linear(), at=("mlp.c_fc",)),
        Role(name="mlp", pattern=plain_mlp("gelu_tanh"), at=("mlp",)),
    ),
)
