"""Decode speed as a ratio: two ways to generate, in turn A B A B, in one process.

    python benchmarks/run.py peers  --shape llama-110m        against transformers' generate
    python benchmarks/run.py passes --shape llama-110m        each optional pass, on against off

For peers, the figure is milliseconds a new token (generate of ``--new`` tokens less a generate of
one): the median of ``--repeat`` alternating runs after a warm-up, and of the pairwise ratios.
For passes it is one prefill and one decode step on the engine's own sessions, called in turn.
``--clock cpu --threads 1`` counts processor time instead: for machines that others use too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import compared, save, show
from shapes import SHAPES, build

import hybrid_fx

PASSES = ("fuse_rms_norm", "concat_qkv", "concat_gate_up", "fuse_mlp", "fuse_add_norm")
Side = Callable[[int], Any]
Step = Callable[[], None]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_a_token(generate: Side, new: int, clock: Callable[[], float]) -> float:
    """Time of ``new`` tokens less that of one, for each token in between."""
    start = clock()
    generate(1)
    middle = clock()
    generate(new)
    end = clock()
    return ((end - middle) - (middle - start)) / (new - 1)


def in_turn(a: Side, b: Side, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds a token of both sides, measured in turn."""
    clock = CLOCKS[args.clock]
    for side in (a, b):
        side(args.new)
    return [
        (seconds_a_token(a, args.new, clock), seconds_a_token(b, args.new, clock))
        for _ in range(args.repeat)
    ]


def side_of(model: Any, batch: int, prompt: int, device: str) -> Side:
    """Greedy generation by ``model.generate`` of a fixed random prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), generator=generator)
    ids = ids.to(device)
    mask = torch.ones_like(ids)

    def generate(new: int) -> Any:
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False
        )
        if device != "cpu":
            torch.cuda.synchronize()
        return out

    return generate


def peers(args: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    """hybrid_fx (a) against transformers (b) at each batch size."""
    plain = copy.deepcopy(model)
    hybrid_fx.hybridize(model, graph=args.graph, disk_cache=False)
    rows = []
    for batch in args.batch:
        ours, theirs = (side_of(m, batch, args.prompt, args.device) for m in (model, plain))
        assert torch.equal(ours(8), theirs(8)) or args.dtype != "float32", "tokens differ"
        pairs = in_turn(ours, theirs, args)
        rows.append(compared(f"transformers / hybrid_fx, batch {batch}", pairs, batch=batch))
    return rows


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


def alternate(a: Step, b: Step, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of two steps called in turn, and of the ratio b / a of neighbours."""
    clock = CLOCKS[args.clock]
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for turn in range(args.repeat * 2 + 6):
            for step, seconds in zip((a, b), times, strict=True):
                start = clock()
                step()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                if turn >= 6:
                    seconds.append(clock() - start)
    ratios = sorted(y / x for x, y in zip(*times, strict=True))
    quarter = len(ratios) // 4
    return {
        "a_ms": 1000 * statistics.median(times[0]),
        "b_ms": 1000 * statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[quarter],
        "ratio_max": ratios[-1 - quarter],
    }


def passes(args: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    """All passes (a) against all but one (b), step by step; the spread is the middle half."""
    rows = []
    twin = copy.deepcopy(model)
    options = {"graph": args.graph, "disk_cache": False, "fusions": "all"}
    ours = hybrid_fx.hybridize(model, **options)
    for name in args.passes:
        engine = hybrid_fx.hybridize(twin, **options, disable_passes=(name,))
        for batch in args.batch:
            on, *a_steps = steps(ours, args, batch)
            off, *b_steps = steps(engine, args, batch)
            for kind, a, b in zip(("prefill", "decode"), a_steps, b_steps, strict=True):
                result = alternate(a, b, args)
                what = f"{name} off / on, {kind}, batch {batch}"
                rows.append({"what": what, "batch": batch, "kind": kind, "pass": name, **result})
            on.close()
            off.close()
        engine.close()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run one comparison; ``--save`` writes it, dated, to ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("peers", "passes"))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-110m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graph", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build(args.shape, dtype=getattr(torch, args.dtype), device=args.device)
    rows = (peers if args.what == "peers" else passes)(args, model)
    title = (
        f"{args.what}: {args.shape}, {args.dtype}, {args.device}, {args.graph}, {args.clock} time"
    )
    show(rows, title)
    if args.save:
        name = f"{args.what}-{args.shape}-{args.dtype}-{args.device}-{args.graph}"
        save(rows, args, name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
