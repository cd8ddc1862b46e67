"""What generating holds beyond the weights is what ``explain()`` says: KV and copies, or KV alone.

Held against the memory of all live tensors, by address, and once against the process itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_ledger import live_bytes, without_collector
from tiny_models import adapted, prompt, tiny

import hybrid_fx

pytestmark = pytest.mark.usefixtures("ledger")

CALL = prompt((5, 1, 8), 3) | {"max_new_tokens": 12, "pad_token_id": 0}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny("llama"),
    "qwen2": lambda: tiny("qwen2"),
    "qwen2 bfloat16": lambda: tiny("qwen2", dtype=torch.bfloat16),
    "opt": lambda: tiny("opt"),
    "gpt2": lambda: tiny("gpt2"),
    "phi3": lambda: tiny("phi3"),
    "lora": lambda: adapted(tiny("llama")),
}
FAST = ("llama", "qwen2 bfloat16", "lora")
#: Constants, angles and the like: bytes that nobody needs to be told of.
SMALL = 512


#: Options that say where weights lie while the engine generates.
WHERE = {
    "packed": {},
    "copied": {"disable_passes": ("pack_weights",)},
    "shared": {"disable_passes": ("pack_weights",), "share_storage": True},
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.deep) for name in MODELS],
)
def test_the_memory_beyond_the_weights_is_what_explain_says(name: str, where: str) -> None:
    model = MODELS[name]()
    with torch.no_grad():
        model(CALL["input_ids"])  # what the model itself keeps from its first forward
    with without_collector():
        before = live_bytes()
        engine = hybrid_fx.hybridize(model, lora="fold", **WHERE[where])
        engine.generate(**CALL)
    with without_collector():
        held = live_bytes() - before
        report = engine.explain()
        assert report.kv_bytes > 0
        assert report.eval_bytes == report.kv_bytes + report.prepared_bytes
        assert 0 <= held - report.eval_bytes < SMALL
        if where == "shared" and name != "lora":
            assert report.prepared_bytes < SMALL, "KV alone"
        elif where == "packed" or name not in ("gpt2", "phi3"):
            assert report.prepared_bytes > 10 * SMALL
        engine.close()
        assert 0 <= live_bytes() - before < SMALL


GROWTH = """
import gc, sys
import torch, transformers, hybrid_fx
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
    num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=64, pad_token_id=0,
)
model = transformers.LlamaForCausalLM(config).eval()
call = {"input_ids": torch.arange(3, 9)[None], "max_new_tokens": 2, "do_sample": False}

def resident():
    gc.collect()
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0]) * 1024

def generate(model, share):
    engine = hybrid_fx.hybridize(
        model, share_storage=share, disk_cache=False, disable_passes=("pack_weights",)
    )
    engine.generate(**call)
    return engine

small = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, pad_token_id=0)).eval()
generate(small, False)  # what torch and the tracer load at their first use
with torch.no_grad():
    model(call["input_ids"])
before = resident()
engine = generate(model, sys.argv[1] == "shared")
print(resident() - before, engine.explain().eval_bytes)
"""


@pytest.mark.deep
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_the_process_grows_by_what_explain_says() -> None:
    grown = {}
    for share in ("copied", "shared"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", GROWTH, share],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
        grown[share], said = map(int, done.stdout.split())
        assert abs(grown[share] - said) < 24e6, (share, grown[share], said)
    # Four layers of q, k, v (2048 x 1024) and gate, up (8192 x 1024) in float32: 168 MB.
    assert grown["copied"] - grown["shared"] > 140e6
