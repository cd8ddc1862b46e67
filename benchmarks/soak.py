"""soak: rollouts of random lengths, and what memory they leave behind.

Each turn is one rollout of random prompts: how many, how long, and how many new tokens are drawn
anew. Memory is the resident memory of the process, read from ``/proc/self/status``: Linux only.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from decode import prompts
from measure import Timer
from record import Column, Result, Row, cell
from shapes import build

import hybrid_fx

REPEAT = 200
COLUMNS: tuple[Column, ...] = (
    ("after", cell("what")),
    ("resident, MiB", cell("resident_mib", ".0f")),
    ("most since the line above, MiB", cell("most_mib", ".0f")),
    ("tokens/s", cell("tokens_s", ".0f")),
)
_STATUS = Path("/proc/self/status")


def resident_mib() -> float:
    """``VmRSS``."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def run(args: argparse.Namespace) -> Result:
    """``--repeat`` rollouts of 1 to ``--prompts`` prompts of up to ``--prompt-tokens`` tokens."""
    if not _STATUS.exists():
        return Result(rows=[{"what": "soak", "error": "/proc/self/status is missing: Linux only"}])
    model: Any = build(args.shape, dtype=getattr(torch, args.dtype), device=args.device)
    rng, timer = random.Random(0), Timer(args.device, args.clock)
    held: list[float] = []
    tokens: list[int] = []
    seconds: list[float] = []
    with hybrid_fx.hybridize(model, graph=args.graph, disk_cache=False, **args.options) as engine:
        for _ in range(args.repeat):
            rows, length = rng.randint(1, args.prompts), rng.randint(2, args.prompt_tokens)
            new = rng.randint(1, args.longest)
            ids = prompts(model, rows, length, args.device)
            seconds.append(timer(lambda ids=ids, new=new: _generate(engine, ids, new)))
            held.append(resident_mib())
            tokens.append(rows * (length + new))
    steps = sorted({max(1, args.repeat * part // 10) for part in range(1, 11)})
    rows_: list[Row] = []
    for start, end in zip([0, *steps], steps, strict=False):
        part = slice(start, end)
        rows_.append(
            {
                "what": f"{end} rollouts",
                "turns": end,
                "resident_mib": held[end - 1],
                "most_mib": max(held[part]),
                "tokens_s": sum(tokens[part]) / sum(seconds[part]),
            }
        )
    third = len(held) // 3
    rise = max(held[third:]) - held[third]
    return Result(
        rows=rows_,
        columns=COLUMNS,
        notes=[f"from the first third on, memory rises by {rise:.0f} MiB at most"],
    )


def _generate(engine: Any, ids: Any, new: int) -> None:
    engine.generate(
        input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=new, do_sample=False
    )
