"""The patterns that families share, on the canonical graph."""

from __future__ import annotations

from ..pattern import Any, Call, Const, Either, Opt, Pattern

_X = Any("x", node=True)


def linear(*, biased: bool | None = None) -> Call:
    """``linear(x, weight, bias)``; ``biased`` says whether there must be a bias, or must not."""
    bias = Any("bias", node=True) if biased else Any("bias")
    return Call("linear", _X, Any("weight"), Const(equals=None) if biased is False else bias)


_WIDE = Opt("to", _X)
_VARIANCE = Call("mean", Call("pow", _WIDE, Const(equals=2)), Const(equals=-1), Const(equals=True))
_SCALE = Call("rsqrt", Call("add", _VARIANCE, Const("eps", float), commutes=True))

#: ``weight * x * rsqrt(mean(x ** 2) + eps)``, computed in float32 where x is narrower.
RMS_NORM = Either(
    Call("rms_norm", _X, Any("weight"), Const("eps", float), more=True),
    Call(
        "mul",
        Any("weight", node=True),
        Opt("to", Call("mul", _WIDE, _SCALE, commutes=True)),
        commutes=True,
    ),
)

#: ``layer_norm(x, shape, weight, bias, eps)``.
LAYER_NORM = Call("layer_norm", _X, Any("shape"), Any("weight"), Any("bias"), Const("eps", float))


#: ``x * cos + rotate_half(x) * sin`` (Su et al. 2021).
ROTARY = Call(
    "add",
    Call("mul", _X, Any("cos", node=True), commutes=True),
    Call("mul", Call("cat", Any("halves"), Const(equals=-1)), Any("sin", node=True), commutes=True),
    commutes=True,
)

_WEIGHTS = Opt("dropout", Opt("to", Call("softmax", more=True)))

#: The canonical op, or what it stands for: torch's own or written out, [B,H,T,D] turned.
ATTENTION = Either(
    Call(("attention", "attend", "attend_one"), Any("q"), Any("k"), Any("v"), more=True),
    Opt(
        "contiguous",
        Call(
            "transpose",
            Either(
                Call("scaled_dot_product_attention", more=True),
                Call("matmul", _WEIGHTS, Any("v", node=True)),
            ),
            Const(equals=1),
            Const(equals=2),
        ),
    ),
)

#: The output projection on the joined heads.
OUTPUT = Call(
    "linear",
    Opt("contiguous", Call(("reshape", "view", "flatten"), ATTENTION, more=True)),
    Any("weight"),
    Any("bias"),
)

_CUBE = Call("mul", Const(equals=0.044715), Call("pow", Any("a", node=True), Const(equals=3.0)))
_TANH = Call("tanh", Call("mul", Const(equals=0.7978845608028654), Call("add", Any("a"), _CUBE)))
#: ``0.5 a (1 + tanh(sqrt(2 / pi) (a + 0.044715 a**3)))`` (Hendrycks & Gimpel 2016).
GELU_TANH = Call(
    "mul", Call("mul", Const(equals=0.5), Any("a")), Call("add", Const(equals=1.0), _TANH)
)


def activation(kind: str) -> Pattern:
    """The activation ``kind`` of the value ``a``."""
    if kind == "gelu_tanh":
        return Either(Call("gelu", Any("a", node=True), named={"approximate": "tanh"}), GELU_TANH)
    return Call(kind, Any("a", node=True))


def plain_mlp(kind: str) -> Call:
    """``down(act(up))`` with ``a`` bound to the up projection."""
    return Call("linear", activation(kind), Any("down"), Any("down_bias"))


def gated_mlp(kind: str) -> Call:
    """``down(act(gate) * up)`` with ``a`` bound to gate and ``up`` to up."""
    product = Call("mul", activation(kind), Any("up", node=True), commutes=True)
    return Call("linear", product, Any("down"), Any("down_bias"))


#: A product of each token with the matrix of its expert; transformers has two ways to write it.
EXPERTS = Call(("grouped_mm", "bmm"), more=True)
