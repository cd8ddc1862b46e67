"""passes: each optional pass, on against off, in one prefill and one decode step in turn."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from measure import Timer, compared, in_turn
from record import Result, Row
from shapes import build

import hybrid_fx
from hybrid_fx.passes.pipeline import OPTIONAL, PACK

REPEAT = 7
#: All but those that need adapters or several ranks.
PASSES = tuple(n for n in (OPTIONAL + PACK).names if n not in ("fold_lora", "shard_tp"))
_WARM = 6
Step = Callable[[], None]


def steps(engine: Any, args: argparse.Namespace, batch: int) -> tuple[Any, Step, Step]:
    """A session of the engine, and on it a prefill of ``--prompt`` tokens and a decode step."""
    runner = engine._graphs.ready()
    generator = torch.Generator().manual_seed(1)
    shape = (batch, args.prompt)
    ids = torch.randint(1, engine.module.config.vocab_size, shape, generator=generator)
    positions = torch.arange(args.prompt).expand(shape)
    ids, positions = ids.to(args.device), positions.to(args.device)
    session = runner.session(batch=batch, capacity=args.prompt + 1)

    def prefill() -> None:
        session.crop(0)
        session.forward(ids, positions)

    def decode() -> None:
        session.crop(args.prompt)
        session.forward(ids[:, :1], positions[:, -1:] + 1)

    return session, prefill, decode


def alternate(a: Step, b: Step, args: argparse.Namespace, what: str, **more: Any) -> Row:
    """A row of two steps called in turn; its spread is the middle half of the ratios."""
    timer = Timer(args.device, args.clock)
    sides = {"a": lambda: timer(a), "b": lambda: timer(b)}
    with torch.no_grad():
        in_turn(sides, _WARM)
        times = in_turn(sides, args.repeat * 2)
    row = compared(what, times["a"], times["b"], **more)
    ratios = sorted(y / x for x, y in zip(times["a"], times["b"], strict=True))
    quarter = len(ratios) // 4
    return {**row, "ratio_min": ratios[quarter], "ratio_max": ratios[-1 - quarter]}


def run(args: argparse.Namespace) -> Result:
    """All passes (a) against all but one (b), step by step."""
    model = build(args.shape, dtype=getattr(torch, args.dtype), device=args.device)
    rows = []
    twin = copy.deepcopy(model)
    options = {"graph": args.graph, "disk_cache": False, "fusions": "all", **args.options}
    ours = hybrid_fx.hybridize(model, **options)
    for name in args.passes:
        engine = hybrid_fx.hybridize(twin, **options, disable_passes=(name,))
        for batch in args.batch:
            on, *a_steps = steps(ours, args, batch)
            off, *b_steps = steps(engine, args, batch)
            for kind, a, b in zip(("prefill", "decode"), a_steps, b_steps, strict=True):
                what = f"{name} off / on, {kind}, batch {batch}"
                more = {"batch": batch, "kind": kind, "pass": name}
                rows.append(alternate(a, b, args, what, **more))
            on.close()
            off.close()
        engine.close()
    ours.close()
    return Result(rows=rows)
