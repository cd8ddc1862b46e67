"""grpo: one sampled rollout with forced lengths, in generated tokens a second over the whole call.

hybrid_fx runs it in several ways (``--ways``), each measured against each peer: ``processor`` by
the rule that ends rows in transformers too, ``lengths`` told the length of each row,
``per_sequence`` drawing each row from a generator of its own as well. The limit is the linear
layers alone: over the distinct prompts, and then over the rows that still run in each step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import forced
import limits
import peers
import torch
from forced import Work
from measure import Seconds, Timer, compared, in_turn
from record import Column, Result, Row, cell, spread_of
from shapes import build
from torch import Tensor

import hybrid_fx

REPEAT = 3  # a turn with transformers is minutes on a CPU
FLOOR = "linear layers alone"
_AT = (1, 4, 8, 16, 32)
COLUMNS: tuple[Column, ...] = (
    ("b / hybrid_fx", cell("what")),
    ("hybrid_fx, s", cell("a_seconds", ".2f")),
    ("tokens/s", cell("a_tokens_s", ".1f")),
    ("b, s", cell("b_seconds", ".2f")),
    ("tokens/s", cell("b_tokens_s", ".1f")),
    ("ratio", cell("ratio", ".2f")),
    ("spread", spread_of("ratio", ".2f")),
)
#: Ways of hybrid_fx: what hybridize is told, and how the rows are ended.
WAYS: dict[str, tuple[dict[str, Any], Callable[[Work], dict[str, Any]]]] = {
    "processor": ({}, Work.options),
    "lengths": ({}, Work.by_length),
    "per_sequence": ({"sampling": "per_sequence"}, Work.by_length),
}


def roll_out(model: Any, work: Work, options: dict[str, Any]) -> Tensor:
    """Tokens [B, T + longest] of ``model.generate``."""
    mask = torch.ones_like(work.ids)
    return work.check(model.generate(input_ids=work.ids, attention_mask=mask, **options))


def batch_seconds(model: Any, work: Work, tokens: int, timer: Timer) -> float:
    """Of continuous batching, each request with a length of its own.

    Its manager is new, so that no prompt is known from an earlier turn; what starting and stopping
    one takes (a second) is left out.
    """
    rows = work.ids.tolist()
    positions = work.ids.shape[1] + max(work.lengths)
    out: list[list[int]] = []
    sizes = (model, len(rows), positions, tokens)
    with peers.BatchSession(*sizes, share=True, **forced.SAMPLING) as session:
        seconds = timer(lambda: out.extend(session(rows, work.lengths)))
    if [len(row) for row in out] != work.lengths:
        raise RuntimeError("continuous batching did not keep the lengths")
    return seconds


def peer_side(name: str, model: Any, work: Work, args: argparse.Namespace, timer: Timer) -> Seconds:
    """The rollout the way of the peer ``name``."""
    if name == "batch":
        return partial(batch_seconds, model, work, args.batch_tokens, timer)
    options = work.options()
    if name == "static":
        positions = work.ids.shape[1] + args.longest
        options |= peers.static_options(args.device, positions)
    return partial(timer, partial(roll_out, model, work, options))


def linear_floor(model: Any, work: Work, timer: Timer) -> float:
    """Seconds of the linear layers alone: distinct prompts once, then the rows still running."""
    floor = limits.LinearAlone(model, timer)

    def median(rows: int) -> float:
        seconds = floor.seconds(rows)
        seconds()
        return statistics.median(seconds() for _ in range(3))

    known = [(rows, median(rows)) for rows in _AT]
    steps = (sum(length > step for length in work.lengths) for step in range(1, max(work.lengths)))
    prompts = work.ids.unique(dim=0)
    return median(prompts.numel()) + sum(limits.interpolated(known, rows) for rows in steps)


def _tokens(row: Row, tokens: int) -> Row:
    for side in "ab":
        row[f"{side}_seconds"] = row[f"{side}_ms"] / 1000
        row[f"{side}_tokens_s"] = tokens / row[f"{side}_seconds"]
    return row


def run(args: argparse.Namespace) -> Result:
    """Each way of hybrid_fx (a) against each peer and the limit (b)."""
    torch.manual_seed(0)
    model = build(args.shape, dtype=getattr(torch, args.dtype), device=args.device)
    work = forced.work(model, args)
    timer = Timer(args.device, args.clock)
    floor = linear_floor(model, work, timer)
    ours: dict[str, Seconds] = {}
    theirs: dict[str, Seconds] = {}
    failed: list[Row] = []
    engines = []
    for way in args.ways:
        settings, options = WAYS[way]
        more = {"disk_cache": False, **settings, **args.options}
        engine = hybrid_fx.hybridize(peers.twin(model), graph=args.graph, **more)
        engines.append(engine)
        call = partial(roll_out, engine.module, work, options(work))
        call()  # all of it: the first call makes plan, prepared tensors and workspace
        ours[way] = partial(timer, call)
    for name in args.peers:
        title, copied = peers.TITLES[name], peers.twin(model)
        try:
            warm = peer_side(name, copied, work.short(), args, timer)
            peers.must_compile(warm) if name == "static" else warm()
            theirs[title] = peer_side(name, copied, work, args, timer)
        except Exception as error:  # a peer that does not run here is a row that says so
            failed.append({"what": title, "error": f"{type(error).__name__}: {error}"})
    times = in_turn(ours | theirs, args.repeat)
    for engine in engines:
        engine.close()
    times[FLOOR] = [floor] * args.repeat
    rows = [
        _tokens(compared(f"{title} / {way}", times[way], times[title]), work.tokens)
        for title in (*theirs, FLOOR)
        for way in ours
    ]
    note = (
        f"{args.prompts} prompts of {args.prompt_tokens} tokens x {args.samples}, "
        f"{work.tokens} new tokens, longest {max(work.lengths)}"
    )
    return Result(rows=rows + failed, columns=COLUMNS, notes=(note,))
