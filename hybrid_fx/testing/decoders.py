"""The strategy of random decoders: a module of drawn choices, traced into its canonical graph."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from .disturb import disturbed
from .example import Example
from .graphs import context_of
from .modules import Decoder, Shape
from .names import ACTIVATIONS, FAMILIES, policy
from .trace import trace

_INT = {"input_ids": torch.int64, "position_ids": torch.int64}


@st.composite
def shapes(draw: st.DrawFn, /, **fixed: Any) -> Shape:
    """Choices of one decoder; ``fixed`` ones are not drawn."""
    names = fixed.get("names") or draw(st.sampled_from(FAMILIES))
    parts = [names.q, names.k, names.v, names.out, names.gate, names.up, names.down]
    kinds = st.sampled_from(("one", "two", "rs", "dora", "chat"))
    adapters = draw(st.dictionaries(st.sampled_from(sorted({*parts})), kinds, max_size=4))
    drawn: dict[str, Any] = {
        "names": names,
        "layers": draw(st.integers(1, 2)),
        "kv_heads": draw(st.integers(1, 3)),
        "groups": draw(st.integers(1, 3)),
        "head_size": draw(st.sampled_from((2, 1, 4))),
        "width": draw(st.sampled_from((4, 2, 3))),
        "norm": draw(st.sampled_from(("rms", "layer", "torch"))),
        "place": draw(st.sampled_from(("pre", "post", "sandwich"))),
        "parallel": draw(st.booleans()),
        "positions": draw(st.sampled_from(("none", "rotary", "learned"))),
        "rotary": draw(st.sampled_from((1.0, 0.5))),
        "biases": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "gated": draw(st.booleans()),
        "mlp_size": draw(st.integers(1, 5)),
        "window": draw(st.sampled_from((0, 2))),
        "adapters": tuple(sorted(adapters.items())),
        "dtype": draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64))),
    }
    return Shape(**{**drawn, **fixed})


def decoder(shape: Shape, seed: int = 0) -> Example:
    """The canonical graph of the decoder of these choices, with values drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        graph = trace(Decoder(shape), _INT)
    layer_norm = shape.norm == "layer"
    one = policy(shape.names, shape.activation, gated=shape.gated, layer_norm=layer_norm)
    policies = {f"layers.{index}": one for index in range(shape.layers)}
    limits = {"input_ids": shape.vocab, "position_ids": 8}
    return Example(graph, context_of(graph, policies), seed, limits=limits)


@st.composite
def decoders(draw: st.DrawFn, /, *, disturbances: int = 0, **fixed: Any) -> Example:
    """Random decoders ``(input_ids, position_ids) -> logits``, as capture hands them over.

    Args:
        disturbances: At most this many writes, aliases, shared users and dead calls are put in.
        fixed: Choices of :class:`~hybrid_fx.testing.modules.Shape` that are not drawn.
    """
    example = decoder(draw(shapes(**fixed)), draw(st.integers(0, 3)))
    return disturbed(draw, example, disturbances)
