"""Small decoders written with torch alone, and compiled models that keep their reports.

Legend: B batch, T tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hybrid_fx.backend import GraphReport, hybrid_fx

EAGER = "eager"


class Norm(nn.Module):
    """RMSNorm, written out as transformers has it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class Mlp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, 2 * size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A Llama layer without attention; ``between`` runs between its halves."""

    def __init__(self, size: int, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(size), Norm(size)
        self.mix, self.mlp = nn.Linear(size, size), Mlp(size)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.input_layernorm(x))
        if self.between is not None:
            x = self.between(x)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Layers in a list: x [B, T, E] -> [B, T, E]."""

    def __init__(
        self, layers: int = 1, size: int = 8, between: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Layer(size, between) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def compiled(
    function: Any, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any
) -> tuple[Any, list[GraphReport]]:
    """``function`` behind the backend, and the list its reports go to."""
    torch._dynamo.reset()
    reports: list[GraphReport] = []
    given = {"report": reports.append, **options}
    kept = torch.compile(
        function, backend=hybrid_fx, dynamic=dynamic, fullgraph=fullgraph, options=given
    )
    return kept, reports


def lines(gm: fx.GraphModule) -> list[str]:
    """The nodes of a graph in order, with names, targets and arguments."""
    return [str(node.format_node()) for node in gm.graph.nodes]


def handed_over(function: Any, *args: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph Dynamo hands over for a call that makes one, and the graph handed on.

    Dynamo clears meta when it is done: what it was then stands in ``meta["then"]``.
    """
    pairs: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        pairs.append(gm)
        for one in pairs:
            for node in one.graph.nodes:
                node.meta["then"] = {k: v for k, v in node.meta.items() if k != "then"}
        return gm

    def outer(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        pairs.append(gm)
        before = lines(gm)
        result = hybrid_fx(gm, inputs, options={"inner": inner, **options})
        assert lines(gm) == before, "the graph that Dynamo handed over is left as it is"
        return result

    torch._dynamo.reset()
    torch.compile(function, backend=outer, fullgraph=True)(*args)
    assert len(pairs) == 2
    return pairs[0], pairs[1]


def gradients(model: nn.Module, loss: Callable[[], Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Every gradient that one backward pass of ``loss`` leaves, by name."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same names, and the same bits under each."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def rewritten(reports: list[GraphReport]) -> list[GraphReport]:
    """The reports of graphs in which something was replaced; none may have failed."""
    assert not [report.failure for report in reports if report.failure]
    return [report for report in reports if report.replaced]
