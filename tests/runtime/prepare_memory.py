"""How far memory rises while an engine prepares: ``python prepare_memory.py JSON``.

The argument is ``{"dtype", "lora"}``; Linux only. Gradients and optimizer state are resident.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from resident_memory import resident

LORA = {"none": None, "fold": 0.1, "side": 1e-6}


def rise(run: Callable[[], Any]) -> int:
    """Bytes that the resident memory rose at most while ``run`` ran."""
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def measure(dtype: str, lora: str) -> dict[str, int]:
    import torch
    from tiny_models import adapted, randomize_adapters, tiny

    import hybrid_fx

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4000}
    model = tiny("llama", layers=8, dtype=getattr(torch, dtype), **sizes)
    if LORA[lora] is not None:
        model = adapted(model)
        randomize_adapters(model, 3, LORA[lora])
        model.to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    engine = hybrid_fx.hybridize(model, disk_cache=False)

    def step() -> None:
        ids = torch.arange(16)[None]
        engine(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    graphs = engine._graphs
    graphs.read()
    tensors = graphs.tensors()
    graphs._prove(tensors)  # what runs once in a process: code pages, thread pools
    graphs.runner.measure(tensors)
    graphs.release()
    first = rise(lambda: graphs._prepare(prove=True))
    held = graphs.runner.prepared.nbytes
    step()
    later = rise(lambda: graphs._prepare(prove=False))
    decided = {row.choice for row in engine.explain().lora}
    assert decided <= {lora}, decided
    return {
        "first": first,
        "later": held + later,
        "held": held,
        "stated": engine.explain().prepare_peak_bytes,
        "weights": sum(t.untyped_storage().nbytes() for t in model.parameters()),
    }


if __name__ == "__main__":
    sys.path.pop(0)
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
