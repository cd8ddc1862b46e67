"""decode: milliseconds a step of greedy generation, by the number of rows.

A step is the time of ``--new`` tokens less that of one, for each token in between. The linear
layers alone and the reading of memory are measured in the same turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from contextlib import ExitStack
from typing import Any

import limits
import peers
import torch
from measure import Seconds, Side, Timer, compared, in_turn, seconds_a_token
from record import Column, Result, Row, cell, spread_of
from shapes import build

import hybrid_fx

REPEAT = 5
LIMITS = {
    "linear": "linear layers alone",
    "read": "reading weights and KV",
    "matrix": "matrix products at full rate",
}


def limit(row: Row) -> str:
    """How near a step comes to a limit, and how many times it is over it."""
    return f"{row['ratio']:.0%}, {1 / row['ratio']:.2f} times" if row["key"] in LIMITS else ""


COLUMNS: tuple[Column, ...] = (
    ("batch", cell("batch")),
    ("against", cell("peer")),
    ("hybrid_fx, ms", cell("a_ms", ".1f")),
    ("it, ms", cell("b_ms", ".1f")),
    ("ratio", cell("ratio", ".2f")),
    ("spread", spread_of("ratio", ".2f")),
    ("of the limit", lambda row: "" if "error" in row else limit(row)),
)


def prompts(model: Any, batch: int, length: int, device: str) -> torch.Tensor:
    """Random ids [B, T], the same every time."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)
    return ids.to(device)


def peer_side(
    name: str, model: Any, ids: torch.Tensor, args: argparse.Namespace, stack: ExitStack
) -> Side:
    """Greedy generation of rows ``ids`` by the peer ``name``, ready until ``stack`` ends."""
    if name == "generate":
        return peers.generate(model, ids, do_sample=False)
    if name == "static":
        options = peers.static_options(args.device, args.prompt + args.new)
        run = peers.generate(model, ids, do_sample=False, **options)
        peers.must_compile(lambda: run(2))
        return run
    rows, positions = ids.tolist(), args.prompt + args.new
    session = stack.enter_context(
        peers.BatchSession(
            model, len(rows), positions, args.batch_tokens, share=False, do_sample=False
        )
    )

    def in_session(new: int) -> torch.Tensor:
        return torch.cat((ids.cpu(), torch.tensor(session(rows, [new] * len(rows)))), 1)

    return in_session


def _row(batch: int, peer: str, title: str) -> Row:
    return {"what": f"{title}, batch {batch}", "batch": batch, "peer": title, "key": peer}


def at_batch(
    batch: int,
    ours: Any,
    theirs: dict[str, Any],
    floor: limits.LinearAlone,
    args: argparse.Namespace,
    stack: ExitStack,
) -> tuple[list[Row], dict[str, float]]:
    """Rows of one batch size, and the limits as they were then."""
    timer = Timer(args.device, args.clock)
    ids = prompts(ours, batch, args.prompt, args.device)
    ours_side = peers.generate(ours, ids, do_sample=False)
    sides: dict[str, Side] = {"hybrid_fx": ours_side}
    failed: list[Row] = []
    same: dict[str, bool] = {}
    expected = ours_side(args.new)
    for name, model in theirs.items():
        row = _row(batch, name, peers.TITLES[name])
        try:
            side = peer_side(name, model, ids, args, stack)
            same[name] = torch.equal(side(args.new).cpu(), expected.cpu())
            sides[name] = side
        except Exception as error:  # a peer that does not run here is a row that says so
            failed.append({**row, "error": f"{type(error).__name__}: {error}"})

    def step(side: Side) -> Seconds:
        return lambda: seconds_a_token(side, args.new, timer)

    turns = {name: step(side) for name, side in sides.items()}
    turns["linear"] = floor.seconds(batch)
    turns["read"] = limits.read_seconds(args.device, timer)
    for warm in turns.values():
        warm()
    times = in_turn(turns, args.repeat)
    a = times["hybrid_fx"]
    positions = args.prompt + args.new / 2
    nbytes = limits.step_bytes(ours, batch=batch, positions=positions)
    flops = limits.step_flops(ours, batch=batch, positions=positions)
    rate = limits.matrix_rate(args.device, getattr(torch, args.dtype), timer)
    titles = {name: peers.TITLES[name] for name in theirs if name in times} | LIMITS
    spent = {
        **times,
        "read": [nbytes * seconds for seconds in times["read"]],
        "matrix": [flops / rate / 1e9] * len(a),
    }
    rows = []
    for name, title in titles.items():
        row = _row(batch, name, title)
        if name in same:
            row["same_tokens"] = same[name]
        rows.append(compared(row.pop("what"), a, spent[name], **row))
    machine = {
        "read_gb_s": 1e-9 / statistics.median(times["read"]),
        "matrix_gflop_s": rate,
    }
    return rows + failed, machine


def run(args: argparse.Namespace) -> Result:
    """hybrid_fx (a) against each peer (b) at each batch size."""
    model = build(args.shape, dtype=getattr(torch, args.dtype), device=args.device)
    plain = copy.deepcopy(model)
    timer = Timer(args.device, args.clock)
    theirs = {name: peers.twin(plain) for name in args.peers}
    floor = limits.LinearAlone(plain, timer)
    options = {"disk_cache": False, **args.options}
    rows: list[Row] = []
    gave: list[dict[str, float]] = []
    with hybrid_fx.hybridize(model, graph=args.graph, **options):
        for batch in args.batch:
            with ExitStack() as stack:
                more, machine = at_batch(batch, model, theirs, floor, args, stack)
            rows += more
            gave.append(machine)
    kind = "F.linear" if floor.packed is None else f"oneDNN, packed in {floor.packed}"
    different = [row["what"] for row in rows if row.get("same_tokens") is False]
    notes = [f"linear layers alone: {kind}"]
    if different:
        notes.append(f"other tokens than hybrid_fx in {args.dtype}: {'; '.join(different)}")
    found = {key: statistics.median(each[key] for each in gave) for key in gave[0]}
    return Result(rows=rows, columns=COLUMNS, limits=found, notes=notes)
