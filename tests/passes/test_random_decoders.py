"""Random decoder configs: the canonical and the rewritten graph compute what the module does.

A policy may decline; the graph must hold either way. Held in float64, where what remains between
two spellings is rounding and a mistake is not.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policy_graphs import layers_of, logits, through, weights
from small_graphs import far
from tiny_models import reweigh

from hybrid_fx.capture import capture
from hybrid_fx.passes.pipeline import OPTIONAL, copy_graph
from hybrid_fx.plan.build import build_plan, normalize

_FEW = max(2, settings().max_examples // 10)  # each draw is traced


@st.composite
def gated(draw: st.DrawFn) -> Any:
    """Llama and Qwen2: heads in groups of any number, biases, ties, activations."""
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 3))
    size = draw(st.sampled_from((2, 4, 6)))
    fields = {
        "vocab_size": 64,
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "max_position_embeddings": 64,
        "hidden_act": draw(st.sampled_from(("silu", "gelu", "relu", "gelu_pytorch_tanh"))),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-3))),
    }
    if draw(st.booleans()):
        return transformers.Qwen2Config(**fields)
    biases = {name: draw(st.booleans()) for name in ("attention_bias", "mlp_bias")}
    own_size = draw(st.sampled_from((None, 8)))
    return transformers.LlamaConfig(**fields, **biases, head_dim=own_size or size)


@st.composite
def plain(draw: st.DrawFn) -> Any:
    """GPT-2 and OPT: any heads, activations, norms before or behind, with or without biases."""
    heads, size = draw(st.integers(1, 5)), draw(st.sampled_from((2, 3, 8)))
    layers, width = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    tied = draw(st.booleans())
    if draw(st.booleans()):
        return transformers.GPT2Config(
            vocab_size=64,
            n_positions=64,
            n_embd=heads * size,
            n_head=heads,
            n_layer=layers,
            n_inner=width,
            activation_function=draw(st.sampled_from(("gelu_new", "relu", "silu", "gelu"))),
            scale_attn_by_inverse_layer_idx=draw(st.booleans()),
            tie_word_embeddings=tied,
        )
    return transformers.OPTConfig(
        vocab_size=64,
        max_position_embeddings=64,
        hidden_size=heads * size,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        ffn_dim=width,
        word_embed_proj_dim=draw(st.sampled_from((heads * size, 5))),
        activation_function=draw(st.sampled_from(("relu", "gelu"))),
        do_layer_norm_before=draw(st.booleans()),
        enable_bias=draw(st.booleans()),
        layer_norm_elementwise_affine=draw(st.booleans()),
        tie_word_embeddings=tied,
    )


def _holds(config: Any) -> None:
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config)
    reweigh(model, 1)
    model = model.double().eval()
    graph = normalize(capture(model).graph)
    held = weights(model)
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (2, 7), generator=rng)
    at = torch.arange(7).expand(2, 7)
    with torch.no_grad():
        wanted = model(input_ids=ids, position_ids=at, use_cache=False).logits
    assert far(logits(graph, held), wanted) < 1e-6
    rewritten = copy_graph(graph)
    through(rewritten, *OPTIONAL.names, told=layers_of(rewritten))
    assert far(logits(rewritten, held), wanted) < 1e-6
    plan = build_plan(graph, model="random", vocab_size=64, fusions="all")
    for row in plan.manifest.layers:
        assert row["policy"] or row["missed"], "a layer that fits no policy says why"  # type: ignore[index,call-overload]


@settings(max_examples=_FEW)
@given(gated())
@example(transformers.LlamaConfig(vocab_size=64, hidden_size=12, num_attention_heads=3,
    num_key_value_heads=1, head_dim=6, intermediate_size=7, num_hidden_layers=2,
    attention_bias=True, mlp_bias=True, max_position_embeddings=64))  # fmt: skip
def test_random_gated_decoders_compute_what_the_module_computes(config: Any) -> None:
    _holds(config)


@settings(max_examples=_FEW)
@given(plain())
@example(transformers.OPTConfig(vocab_size=64, max_position_embeddings=64, hidden_size=12,
    num_attention_heads=3, num_hidden_layers=2, ffn_dim=7, word_embed_proj_dim=5,
    do_layer_norm_before=False, enable_bias=False, layer_norm_elementwise_affine=False)
)  # fmt: skip
def test_random_plain_decoders_compute_what_the_module_computes(config: Any) -> None:
    _holds(config)
