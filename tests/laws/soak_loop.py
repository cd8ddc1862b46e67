"""Generate, train and step with random shapes, again and again: ``python soak_loop.py JSON``.

The argument is ``{"cycles", "check", "longest"}``: how often, every how many cycles tokens are held
against transformers, and the longest prompt. Prints the resident memory, MiB, after each cycle.
Linux only. It is a process of its own, as memory is the process's.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from resident_memory import MIB, resident


def soak(cycles: int, check: int, longest: int) -> list[float]:
    import torch
    from tiny_models import adapted, tiny

    import hybrid_fx

    rng = random.Random(0)
    model = adapted(tiny("llama", max_position_embeddings=2 * longest + 32))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    held: list[float] = []

    def call() -> dict[str, Any]:
        rows, tokens = rng.randint(1, 6), rng.randint(2, longest)
        ids = torch.tensor([[rng.randint(3, 63) for _ in range(tokens)] for _ in range(rows)])
        mask = torch.ones_like(ids)
        for row in range(1, rows):  # padded on the left
            mask[row, : rng.randint(0, tokens - 1)] = 0
        return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": rng.randint(2, 12)}

    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        for cycle in range(cycles):
            engine.eval()
            given = call() | {"do_sample": False}
            out = engine.generate(**given)
            if cycle % check == check - 1:
                wanted = engine._plain_generate(**given)
                assert torch.equal(out, wanted), f"other tokens in cycle {cycle}"
            engine.train()
            engine(input_ids=out, labels=out).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            held.append(resident() / MIB)
        assert engine.stats.fallbacks == {}
    return held


if __name__ == "__main__":
    sys.path.pop(0)
    print(json.dumps(soak(**json.loads(sys.argv[1]))))
