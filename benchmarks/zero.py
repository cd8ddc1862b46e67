"""Generating under ZeRO-3 as a ratio: two ways in turn, on several ranks of one machine.

    python benchmarks/zero.py --shape q05 --nproc 2 --save

It starts its own processes. A turn of ``generate`` is one greedy call behind a change of the
weights, so that each side gathers what it needs:

- transformers' generate under DeepSpeed's hooks, which gather each module at each token;
- TRL's ``unwrap_model_for_generation``, where trl is installed, which gathers all of them once.

``decode`` is the time of a further token, against the same model without ZeRO. ``gather`` makes
all weights whole as a prepare does, against one flat all-gather of as many bytes into memory that
was used before.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from measure import Side, Timer, compared, in_turn, seconds_a_token
from record import Result, save, show
from shapes import SHAPES, build

import hybrid_fx
from hybrid_fx.distributed.torch_collectives import all_gather_single

Step = Callable[[], object]


def engine_of(args: argparse.Namespace) -> Any:
    """A ZeRO-3 engine that generates."""
    model = build(args.shape, dtype=torch.float32, device="cpu", layers=args.layers)
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": args.dtype == "bfloat16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "hybrid_engine": {"enabled": True, "pin_parameters": not args.stream},
    }
    return hybrid_fx.initialize(model=model, config=config)[0]


def by_hooks(engine: Any) -> Callable[..., Any]:
    """transformers' generate of the module that DeepSpeed hooked."""
    kind: Any = type(engine.module)
    return lambda **given: kind.generate(engine.module, synced_gpus=True, **given)


def by_trl(engine: Any) -> Callable[..., Any]:
    """TRL's: all weights gathered, DeepSpeed's hooks removed meanwhile."""
    from trl.models.utils import unwrap_model_for_generation

    plugin = SimpleNamespace(zero_stage=3)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin), unwrap_model=lambda model: model.module
    )

    def generate(**given: Any) -> Any:
        with unwrap_model_for_generation(engine, accelerator) as model:
            return type(model).generate(model, **given)

    return generate


def call(run: Callable[..., Any], args: argparse.Namespace, device: Any, vocab: int) -> Side:
    """A greedy generate of a fixed random prompt, by the number of new tokens."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    ids = torch.randint(1, vocab, (args.batch, args.prompt), generator=generator).to(device)
    mask = torch.ones_like(ids)

    def generate(new: int) -> Any:
        return run(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)

    return generate


def together(a: Step, b: Step, repeat: int) -> tuple[list[float], list[float]]:
    """Seconds of both, called in turn; every rank begins together and all have to end."""

    def seconds(step: Step) -> float:
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        return time.perf_counter() - start

    a()
    b()
    times = in_turn({"a": lambda: seconds(a), "b": lambda: seconds(b)}, repeat)
    return times["a"], times["b"]


def generating(engine: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole call against both peers."""
    vocab = engine.module.config.vocab_size
    device = engine.device

    def ours(**given: Any) -> Any:
        engine.weights_changed()
        return engine.generate(**given)

    peers = {"transformers under DeepSpeed's hooks": by_hooks(engine)}
    if importlib.util.find_spec("trl"):
        peers["TRL's unwrap_model_for_generation"] = by_trl(engine)
    rows = []
    for name, peer in peers.items():
        mine, theirs = (call(run, args, device, vocab) for run in (ours, peer))
        if args.dtype == "float32":
            assert torch.equal(mine(4), theirs(4)), "tokens differ"
        steps = (partial(side, args.new) for side in (mine, theirs))
        times = together(*steps, args.repeat)
        rows.append(compared(f"{name} / hybrid_fx", *times, kind="generate"))
    return rows


def decoding(engine: Any, args: argparse.Namespace) -> dict[str, Any]:
    """A further token under ZeRO-3 (b) against the same model whole (a)."""
    dtype = getattr(torch, args.dtype)
    whole = build(args.shape, dtype=dtype, device=engine.device, layers=args.layers)
    plain = hybrid_fx.hybridize(whole, disk_cache=False)
    vocab, timer = whole.config.vocab_size, Timer(engine.device.type)
    a, b = (call(one.generate, args, engine.device, vocab) for one in (plain, engine))

    def seconds(side: Side) -> float:
        dist.barrier()
        return seconds_a_token(side, args.new, timer)

    a(args.new)
    b(args.new)
    times = in_turn({"a": lambda: seconds(a), "b": lambda: seconds(b)}, args.repeat)
    plain.close()
    return compared("decode under ZeRO-3 / without ZeRO", times["a"], times["b"], kind="decode")


def gathering(engine: Any) -> tuple[Step, Step, int]:
    """One flat collective, the gather of a prepare, and the bytes they make whole."""
    source, runner = engine._source, engine._graphs.runner
    shards = list(source._shards().values())
    ranks = dist.get_world_size()
    mine = torch.cat([shard.part.detach().reshape(-1).to(shard.device) for shard in shards])
    rows = mine.new_empty(ranks * mine.numel())
    names = [weight.name for weight in runner.plan.manifest.weights]

    def flat() -> None:
        all_gather_single(rows, mine)

    def prepare() -> None:
        tensors = source.tensors()
        source.gather.begin([tensors[name] for name in names], lambda _: nullcontext())
        for name in names:
            source.gather(tensors[name])
        source.gather.end()

    return flat, prepare, rows.numel() * rows.element_size()


def work(rank: int, port: int, args: argparse.Namespace) -> None:
    """One rank."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(args.nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(args.threads)
    deepspeed.utils.logger.setLevel("ERROR")
    engine = engine_of(args)
    rows = generating(engine, args)
    rows.append(decoding(engine, args))
    if not args.stream:
        flat, prepare, nbytes = gathering(engine)
        times = together(prepare, flat, args.repeat)
        rows.append(compared("one flat all_gather / gather", *times, kind="gather", bytes=nbytes))
    if rank == 0:
        name = f"zero-{args.shape}-{args.dtype}-{engine.device.type}-{args.nproc}-ranks"
        result = Result(rows=rows)
        show(result, name.replace("-", " "))
        if args.save:
            args.device = engine.device.type
            save(result, args, name, deepspeed=deepspeed.__version__)
    dist.barrier()


def main(argv: list[str] | None = None) -> int:
    """Start the ranks; rank 0 prints, and with ``--save`` writes ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-110m")
    parser.add_argument("--layers", type=int, default=None, help="instead of the shape's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--stream", action="store_true", help="pin_parameters=false")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port, args), nprocs=args.nproc)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
