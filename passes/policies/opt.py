"""OPT: LayerNorm before (or, OPT-350m, behind) each half, learned positions, biased projections,
plain ReLU MLP without a module of its own."""

from ..roles import Policy, Role
from .patterns import LAYER_NORM, OUTPUT, linear, plain_mlp

OPT = Policy(
    name="opt",
    roles=(
        Role(
            name="norm",
            pattern=LAYER_NORM,
            at=("self_attn_layer_norm", "final_layer_norm"),
            count=2,
        ),
        Role(name="q", pattern=linear(), at=("self_attn.q_proj",)),
        Role(name="k", pattern=linear(), at=("self_attn.k_proj",)),
        Role(name="v", pattern=linear(), at=("self_attn.v_proj",)),
        Role(name="output", pattern=OUTPUT, at=("self_attn.out_proj",)),
        Role(name="up", pattern=linear(), at=("fc1",)),
        Role(name="mlp", pattern=plain_mlp("relu"), at=("fc2",)),
    ),
)
