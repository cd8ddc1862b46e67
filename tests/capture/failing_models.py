"""Models whose forward does not capture, and how far a trace of them comes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny

from hybrid_fx.capture.watch import Watch


def tiny_jamba(layers: int = 2) -> Any:
    """State-space layers that loop over the length, an attention among each four; in eval."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.JambaConfig(
        **sizes,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=4,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.JambaForCausalLM(config).eval()


def watched(patch: pytest.MonkeyPatch) -> list[Watch]:
    """The watches of all traces from now on."""
    watches: list[Watch] = []

    def watch(*args: Any) -> Watch:
        watches.append(Watch(*args))
        return watches[-1]

    # The package has a function of the module's name.
    patch.setattr(sys.modules["hybrid_fx.capture.capture"], "Watch", watch)
    return watches


def doubles_what_is_long(module: Any, args: Any, out: Any) -> Any:
    return out * 2 if out.shape[1] > 5 else out


def branching_llama(seed: int = 0) -> Any:
    """A hook on its first layer asks for the length."""
    model = tiny("llama", seed)
    model.model.layers[0].mlp.register_forward_hook(doubles_what_is_long)
    return model
