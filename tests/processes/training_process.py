"""Train one step in a fresh interpreter: ``training_process.py CACHE`` prints a JSON line."""

from __future__ import annotations

import json
import sys
from typing import Any


def train_once(cache_dir: str) -> dict[str, Any]:
    """One step of a tiny GPT-2 on its training graph: the loss, and what the engine counted."""
    import torch
    from tiny_models import prompt, tiny

    import hybrid_fx

    model = tiny("gpt2", layers=1)
    batch = prompt((6, 4))
    with hybrid_fx.hybridize(model, train_graph=True, cache_dir=cache_dir) as engine:
        torch.manual_seed(0)
        engine.train()
        loss = engine(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        return {
            "loss": loss.item(),
            "slope": float(model.lm_head.weight.grad.norm()),
            "counters": dict(engine.stats.counters),
            "fallbacks": dict(engine.stats.fallbacks),
        }


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: the tests are found by their package names
    import torch

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this process must not trace")

    torch.compile = refuse
    print(json.dumps(train_once(sys.argv[1])))
