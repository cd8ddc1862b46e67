"""A decoder that is put together from choices: heads, norms, positions, MLP, adapters.

Written with plain torch, as model code is: what passes are to recognise is not taken from them.
Legend: B batch, T tokens, E hidden size, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..passes.attention import attention
from .names import LLAMA, Names


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one decoder is; ``adapters`` are kinds of LoRA by the name of a projection.

    ``norm`` is ``"rms"`` (written out), ``"torch"`` (torch's own RMSNorm) or ``"layer"``; ``place``
    is ``"pre"``, ``"post"`` or ``"sandwich"``; ``positions`` ``"rotary"``, ``"learned"`` or
    ``"none"``; ``rotary`` the part of a head that turns.
    """

    names: Names = LLAMA
    vocab: int = 7
    layers: int = 1
    kv_heads: int = 1
    groups: int = 1
    head_size: int = 2
    width: int = 4
    norm: str = "rms"
    place: str = "pre"
    parallel: bool = False
    positions: str = "rotary"
    rotary: float = 1.0
    biases: bool = False
    tied: bool = False
    activation: str = "silu"
    gated: bool = True
    mlp_size: int = 3
    window: int = 0
    adapters: tuple[tuple[str, str], ...] = ()
    dtype: torch.dtype = torch.float32


class RMSNorm(nn.Module):
    """As the Llama family writes it."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype  # of what it is given
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.1)
        return self.weight * wide.to(self.dtype)


class Adapted(nn.Module):
    """A linear with LoRA beside it: ``"one"``, ``"two"`` adapters, ``"rs"`` scaled, ``"dora"``."""

    def __init__(self, inputs: int, outputs: int, bias: bool, kind: str) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs, bias=bias)
        self.kind, rank = kind, 2
        names = ("default", "other") if kind == "two" else ("default",)
        self.lora_A = nn.ModuleDict({n: nn.Linear(inputs, rank, bias=False) for n in names})
        self.lora_B = nn.ModuleDict({n: nn.Linear(rank, outputs, bias=False) for n in names})
        self.scale = 4 / rank**0.5 if kind == "rs" else 0.5
        if kind == "dora":
            self.magnitude = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base_layer(x)
        result = base
        for name, first in self.lora_A.items():
            low = self.lora_B[name](first(F.dropout(x, 0.1, False)))
            if self.kind != "dora":
                result = result + low * self.scale
                continue
            weight, bias = self.base_layer.weight, self.base_layer.bias
            low_weights: tuple[Any, Any] = (self.lora_B[name].weight, first.weight)
            turned = low_weights[0] @ low_weights[1]
            length = torch.linalg.vector_norm(weight + self.scale * turned, dim=1)
            factor = (self.magnitude / length).view(1, -1)
            plain = base if bias is None else base - bias
            result = base + ((factor - 1) * plain + factor * low * self.scale)
        return result


class WithFactors(nn.Module):
    """A linear that holds its LoRA factors itself, as DeepSpeed-Chat writes it."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        linear = nn.Linear(inputs, outputs, bias=bias)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_right_weight = nn.Parameter(torch.ones(inputs, 2))
        self.lora_left_weight = nn.Parameter(torch.ones(2, outputs))

    def forward(self, x: Tensor) -> Tensor:
        low = F.dropout(x, 0.1, False) @ self.lora_right_weight @ self.lora_left_weight
        return F.linear(x, self.weight, self.bias) + low * 0.5


def _linear(shape: Shape, name: str, inputs: int, outputs: int) -> nn.Module:
    kind = dict(shape.adapters).get(name)
    if kind is None:
        return nn.Linear(inputs, outputs, bias=shape.biases)
    if kind == "chat":
        return WithFactors(inputs, outputs, shape.biases)
    return Adapted(inputs, outputs, shape.biases, kind)


def _norm(shape: Shape) -> nn.Module:
    if shape.norm == "layer":
        return nn.LayerNorm(shape.width, eps=0.1)
    return (
        RMSNorm(shape.width, shape.dtype)
        if shape.norm == "rms"
        else nn.RMSNorm(shape.width, eps=0.1)
    )


def _turned(x: Tensor, cos: Tensor, sin: Tensor, part: int) -> Tensor:
    turning, rest = x[..., :part], x[..., part:]
    half = part // 2
    swapped = torch.cat((-turning[..., half:], turning[..., :half]), -1)
    return torch.cat((turning * cos + swapped * sin, rest), -1)


class Attention(nn.Module):
    """Causal self-attention of H = K * groups heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, names = shape, shape.names
        self.part = 2 * int(shape.head_size * shape.rotary / 2)
        for name, heads in self._heads().items():
            self.add_module(name, _linear(shape, name, shape.width, heads * shape.head_size))
        joined = shape.kv_heads * shape.groups * shape.head_size
        self.add_module(names.out, _linear(shape, names.out, joined, shape.width))
        if self.part:
            self.register_buffer("inv_freq", 1.0 / 10 ** torch.arange(0.0, self.part, 2))

    def _heads(self) -> dict[str, int]:
        kv, names = self.shape.kv_heads, self.shape.names
        return {names.q: kv * self.shape.groups, names.k: kv, names.v: kv}

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        batch, tokens = x.size(0), x.size(1)
        shape, heads = self.shape, []
        for name, count in self._heads().items():
            split = self.get_submodule(name)(x).view(batch, tokens, count, shape.head_size)
            heads.append(split.transpose(1, 2))
        query, key, value = heads
        if shape.positions == "rotary" and self.part:
            frequencies: Any = self.inv_freq
            angle = position_ids[:, None, :, None].to(torch.float32) * frequencies
            angle = torch.cat((angle, angle), -1)
            cos, sin = angle.cos().to(shape.dtype), angle.sin().to(shape.dtype)
            query, key = (_turned(t, cos, sin, self.part) for t in (query, key))
        out = attention(query, key, value, shape.head_size**-0.5, shape.window)
        out = out.reshape(batch, tokens, shape.kv_heads * shape.groups * shape.head_size)
        projected: Tensor = self.get_submodule(shape.names.out)(out)
        return projected


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "gelu_tanh":  # as GPT-2 writes it
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))
    functions: dict[str, Any] = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}
    active: Tensor = functions[kind](x)
    return active


def _add_mlp(owner: nn.Module, shape: Shape) -> None:
    names, (e, f) = shape.names, (shape.width, shape.mlp_size)
    for name in (names.gate, names.up) if shape.gated else (names.up,):
        owner.add_module(name, _linear(shape, name, e, f))
    owner.add_module(names.down, _linear(shape, names.down, f, e))


def _mlp(owner: nn.Module, shape: Shape, x: Tensor) -> Tensor:
    """Gated or plain, of the parts that stand in ``owner``."""
    names, kind = shape.names, shape.activation
    hidden = owner.get_submodule(names.up)(x)
    if shape.gated:
        hidden = _activate(owner.get_submodule(names.gate)(x), kind) * hidden
    else:
        hidden = _activate(hidden, kind)
    projected: Tensor = owner.get_submodule(names.down)(hidden)
    return projected


class MLP(nn.Module):
    """An MLP with a module of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        _add_mlp(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        return _mlp(self, self.shape, x)


class Layer(nn.Module):
    """Attention and MLP, one behind the other or side by side."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, names = shape, shape.names
        self.add_module(names.attention, Attention(shape))
        if names.mlp:
            self.add_module(names.mlp, MLP(shape))
        else:
            _add_mlp(self, shape)
        for name in names.norms:
            self.add_module(name, _norm(shape))
        self.behind = nn.ModuleList(_norm(shape) for _ in range(2 * (shape.place == "sandwich")))

    def _mlp(self, x: Tensor) -> Tensor:
        own = self.shape.names.mlp
        done: Tensor = self.get_submodule(own)(x) if own else _mlp(self, self.shape, x)
        return done

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        shape, names = self.shape, self.shape.names
        first, second = (self.get_submodule(name) for name in names.norms)
        attend = self.get_submodule(names.attention)
        if shape.parallel:
            normed = first(x)
            return x + attend(normed, position_ids) + self._mlp(second(x))
        if shape.place == "post":
            x = first(x + attend(x, position_ids))
            return second(x + self._mlp(x))
        attended = attend(first(x), position_ids)
        x = x + (self.behind[0](attended) if self.behind else attended)
        done = self._mlp(second(x))
        return x + (self.behind[1](done) if self.behind else done)


class Decoder(nn.Module):
    """Token ids and positions [B, T] -> logits [B, T, V]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.positions = nn.Embedding(8, shape.width) if shape.positions == "learned" else None
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = _norm(shape)
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)
        if shape.tied:
            self.lm_head.weight = self.embed.weight
        self.to(shape.dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.positions is not None:
            x = x + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x, position_ids)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
