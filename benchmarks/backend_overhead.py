"""Processor time that the backend adds to each graph, where it rewrites it and where it cannot.

    python benchmarks/backend_overhead.py

Each line is one graph of Dynamo: its nodes, and the least of ``--repeat`` measured milliseconds,
without the time of what runs the graph afterwards.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn

from hybrid_fx.backend.compile import rewrite
from hybrid_fx.backend.options import BackendOptions


class Block(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(size, size, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(size), nn.BatchNorm2d(size)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def resnet() -> tuple[nn.Module, Any]:
    """Fifty blocks."""
    return nn.Sequential(*(Block(4) for _ in range(50))), torch.randn(1, 4, 8, 8)


def encoder() -> tuple[nn.Module, Any]:
    """Twelve layers of torch's own encoder, the norms first."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, norm_first=True, batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False), torch.randn(2, 5, 32)


def bert() -> tuple[nn.Module, Any]:
    """Twelve layers of BERT."""
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64
    )
    return transformers.BertModel(config), torch.ones(2, 5, dtype=torch.int64)


def llama() -> tuple[nn.Module, Any]:
    """Twelve layers of Llama, which are rewritten."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=12,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config), torch.ones(2, 5, dtype=torch.int64)


def graph_of(model: nn.Module, example: Any) -> fx.GraphModule:
    """The graph that Dynamo hands over for one call."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(gm)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model.eval(), backend=keep)(example)
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=9)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    for make in (resnet, encoder, bert, llama):
        gm = graph_of(*make())
        times = []
        with torch.no_grad():
            for _ in range(repeat):
                start = time.process_time()
                module, report = rewrite(gm, BackendOptions())
                times.append(1000 * (time.process_time() - start))
        kept = "the same graph" if module is gm else f"{report.replaced} values replaced"
        print(f"{make.__name__:8} {len(gm.graph.nodes):5} nodes {min(times):7.1f} ms  {kept}")


if __name__ == "__main__":
    main()
