"""LoRA layers in the form of DeepSpeed-Chat: the factors stand in the linear layer itself.

The forward is ``linear(x, W, b) + (dropout(x) @ right @ left) * scaling``, with right [in, R] and
left [R, out]; a fused layer computes ``linear(x, W + scaling * (right @ left)^T, b)`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChatLoraLinear(nn.Module):
    """A linear layer that is frozen, and a low-rank product beside it that is trained."""

    def __init__(self, linear: nn.Linear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad = False
        rows, columns = self.weight.shape
        self.lora_right_weight = nn.Parameter(self.weight.new_zeros(columns, rank))
        self.lora_left_weight = nn.Parameter(self.weight.new_zeros(rank, rows))
        self.lora_scaling = scaling
        self.lora_dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fuse_lora = False

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.fuse_lora:
            return out
        low = self.lora_dropout(x) @ self.lora_right_weight @ self.lora_left_weight
        return out + low * self.lora_scaling

    def _delta(self) -> Tensor:
        return self.lora_scaling * (self.lora_right_weight @ self.lora_left_weight).t()

    def fuse_lora_weight(self) -> None:
        """Add the product to the weight, unseen by its version counter."""
        if not self.fuse_lora:
            self.weight.data += self._delta().detach()
            self.fuse_lora = True

    def unfuse_lora_weight(self) -> None:
        """Take it off again; the weight keeps what rounding did to it."""
        if self.fuse_lora:
            self.weight.data -= self._delta().detach()
            self.fuse_lora = False


def chat_adapted(
    model: nn.Module,
    seed: int = 7,
    *,
    rank: int = 4,
    scaling: float = 2.0,
    dropout: float = 0.1,
    target: Callable[[str], bool] = lambda path: "layers." in path,
    train_all: bool = False,
) -> Any:
    """``model`` with its linear layers replaced, their factors all random, in eval.

    Args:
        target: Says by its path whether a linear layer is replaced.
        train_all: Leave what stands beside the factors to be trained as well.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and target(path):
            owner, _, name = path.rpartition(".")
            new = ChatLoraLinear(module, rank, scaling, dropout)
            setattr(model.get_submodule(owner), name, new)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = train_all or "lora_" in name
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=rng) * 0.1
            parameter.data.copy_(noise)
    return model.eval()


def chat_layers(model: nn.Module) -> dict[str, ChatLoraLinear]:
    """Every layer of this form, by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ChatLoraLinear)}
