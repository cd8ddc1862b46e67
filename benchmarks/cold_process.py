"""One process of the cold workload: ``python benchmarks/cold_process.py '{"shape": ...}'``."""

from __future__ import annotations

import argparse
import json
import sys

import torch
from decode import prompts
from measure import Timer
from shapes import build


def first_token(args: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first token, of its prepare, and of the same call again."""
    dtype = getattr(torch, args.dtype)
    model = build(args.shape, dtype=dtype, device=args.device, layers=args.layers)
    ids = prompts(model, 1, args.prompt, args.device)
    timer = Timer(args.device, args.clock)
    start = timer.now()

    import hybrid_fx

    engine = hybrid_fx.hybridize(
        model, graph=args.graph, cache_dir=f"{args.folder}/plans", **args.options
    )
    mask = torch.ones_like(ids)

    def generate() -> None:
        engine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False)

    generate()
    seconds = timer.now() - start
    prepare = engine.stats.seconds.get("prepare", 0.0)
    captures = engine.stats.counters["captures"]
    prefill = timer(generate)
    return {"seconds": seconds, "prepare": prepare, "captures": captures, "prefill": prefill}


if __name__ == "__main__":
    given = argparse.Namespace(**json.loads(sys.argv[1]))
    if given.threads:
        torch.set_num_threads(given.threads)
    print(json.dumps(first_token(given)))
