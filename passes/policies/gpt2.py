"""GPT-2: LayerNorm before each half, learned positions, one fused q-k-v projection of transposed
weights (Conv1D), plain MLP with the tanh form of GELU."""

from ..roles import Policy, Role
from .patterns import LAYER_NORM, OUTPUT, linear, plain_mlp

GPT2 = Policy(
    name="gpt2",
    roles=(
        Role(name="norm", pattern=LAYER_NORM, at=("ln_1", "ln_2"), count=2),
        Role(name="qkv", pattern=linear(), at=("attn.c_attn",)),
        Role(name="output", pattern=OUTPUT, at=("attn.c_proj",)),
        Role(name="up", pattern=linear(), at=("mlp.c_fc",)),
        Role(name="mlp", pattern=plain_mlp("gelu_tanh"), at=("mlp",)),
    ),
    gains=frozenset({"fuse_mlp"}),
)
