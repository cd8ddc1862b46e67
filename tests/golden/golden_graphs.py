"""The small models whose generated sources are kept as text, and how the text is made.

They are the smallest that show every pass: a Llama with LoRA, folded but for one place that stays
a branch, with every fusion; a GPT-2 as it is served by default; and a Llama whose layers gather
their own weights.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB, adapted, tiny
from torch import Tensor, nn

from hybrid_fx.capture import capture
from hybrid_fx.config import HybridConfig
from hybrid_fx.plan.build import build_plan, normalize
from hybrid_fx.plan.choice import optional_passes
from hybrid_fx.plan.plan import Plan

FOLDER = Path(__file__).resolve().parent
COMMAND = "make golden"


class Angles(nn.Module):
    """Rotary angles in one fixed spelling: that of transformers' own changes between releases."""

    def __init__(self, size: int) -> None:
        super().__init__()
        steps = torch.arange(0, size, 2, dtype=torch.float32) / size
        self.inv_freq = nn.Buffer(10000.0**-steps, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [B, T, D], for positions [B, T]."""
        half = position_ids.unsqueeze(-1).float() * self.inv_freq
        angles = torch.cat((half, half), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _llama_lora() -> Plan:
    model = tiny("llama")
    model.model.rotary_emb = Angles(8)
    graph = normalize(capture(adapted(model)).graph)
    side = frozenset({"self_attn.o_proj"})
    return build_plan(graph, model="llama_lora", vocab_size=VOCAB, side=side, fusions="all")


def _gpt2() -> Plan:
    graph = normalize(capture(tiny("gpt2")).graph)
    return build_plan(graph, model="gpt2", vocab_size=VOCAB, passes=optional_passes(HybridConfig()))


def _streamed() -> Plan:
    model = tiny("llama", layers=3)
    model.model.rotary_emb = Angles(8)
    graph = normalize(capture(model).graph)
    passes = optional_passes(HybridConfig(), stream=True)
    return build_plan(graph, model="streamed", vocab_size=VOCAB, passes=passes, stream=True)


MODELS = {
    "llama_lora": ("a tiny Llama with LoRA, its output projection on the side", _llama_lora),
    "gpt2": ("a tiny GPT-2", _gpt2),
    "streamed": ("a tiny Llama whose layers gather their own weights", _streamed),
}


def _tables(plan: Plan) -> list[str]:
    """What ``weights`` and ``prepared`` hold by number."""
    manifest = plan.manifest
    lines = [
        f"# weights[{number}] = {weight.name} {weight.dtype} {list(weight.shape)}"
        for number, weight in enumerate(manifest.weights)
    ]
    for number, tensor in enumerate(manifest.prepared):
        own = "" if tensor.owns_memory else ", owns no memory"
        memory = ", packed" if tensor.packed else own
        kind = f"{tensor.dtype} {list(tensor.shape)}{memory}"
        lines += [f"# prepared[{number}] = {tensor.name} {kind}", f"#     {tensor.recipe}"]
    for row, weights in itertools.groupby(manifest.streamed, key=lambda weight: weight.layer):
        lines += [f"# shards[{row}] = {', '.join(weight.name for weight in weights)}"]
    lines += [f"# keys[{n}], values[{n}]: {kv.path}" for n, kv in enumerate(manifest.kv)]
    return lines


def _reports(plan: Plan) -> list[str]:
    """What became of each layer."""
    layers: tuple[Any, ...] = plan.manifest.layers
    return [f"# {row['path']}: {row['policy']}: {json.dumps(row['fused'])}" for row in layers]


def golden_files() -> dict[str, str]:
    """File name -> text, for each stage of each model."""
    found = {}
    for name, (what, build) in MODELS.items():
        plan = build()
        for stage, source in plan.sources.items():
            head = [
                f"# The {stage} source of {what}.",
                f"# Compared exactly by test_golden.py; written by: {COMMAND}",
            ]
            if stage == "prepare":
                head += ["#", *_reports(plan), "#", *_tables(plan)]
            found[f"{name}.{stage}.py.txt"] = "\n".join([*head, "", "", source])
    return found
