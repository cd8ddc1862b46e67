"""What the parts of a decoder layer are called in three families, and policies that find them."""

from __future__ import annotations

from dataclasses import dataclass

from ..passes.policies.patterns import LAYER_NORM, RMS_NORM, gated_mlp, linear, plain_mlp
from ..passes.roles import Policy, Role


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names of the submodules of a layer; ``mlp`` is "" where its parts stand in the layer."""

    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    qkv: str = "qkv_proj"
    out: str = "o_proj"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")

    def in_mlp(self, name: str) -> str:
        """The path of a part of the MLP, relative to the layer."""
        return f"{self.mlp}.{name}" if self.mlp else name


LLAMA = Names()
GPT2 = Names(
    attention="attn", qkv="c_attn", out="c_proj", up="c_fc", down="c_proj", norms=("ln_1", "ln_2")
)
OPT = Names(
    out="out_proj", mlp="", up="fc1", down="fc2", norms=("self_attn_layer_norm", "final_layer_norm")
)
FAMILIES = (LLAMA, GPT2, OPT)
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")


def policy(names: Names, activation: str, *, gated: bool, layer_norm: bool = False) -> Policy:
    """The policy of a family of these names: its norms are found wherever they stand."""
    path = f"{names.attention}."
    inner = gated_mlp(activation) if gated else plain_mlp(activation)
    return Policy(
        name="drawn",
        roles=(
            Role(name="norm", pattern=LAYER_NORM if layer_norm else RMS_NORM),
            Role(name="q", pattern=linear(), at=(path + names.q,)),
            Role(name="k", pattern=linear(), at=(path + names.k,)),
            Role(name="v", pattern=linear(), at=(path + names.v,)),
            Role(name="gate", pattern=linear(), at=(names.in_mlp(names.gate),)),
            Role(name="up", pattern=linear(), at=(names.in_mlp(names.up),)),
            Role(name="mlp", pattern=inner, at=(names.mlp or names.down,)),
        ),
    )
