"""decode and grpo against vLLM, in alternating processes: ``make bench-peers``.

    python benchmarks/bench_peers.py decode grpo --shape q05 --save

vLLM is installed into ``--environment`` by the first run, about 3 GB. It gets the same random
weights, holds its copy beside ours, and compiles in its first call. One process works at a time.
Its prefix cache is on, and emptied before each call, as new weights would.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import forced
import peers
import plot
import run as command
import torch
from decode import prompts
from environment import VLLM, EnvironmentFailed, vllm_python
from grpo import WAYS, roll_out
from measure import Timer, compared, in_turn, seconds_a_token
from record import Result, Row, save, show
from shapes import build

import hybrid_fx


class Generates(Protocol):
    """New tokens of ``prompts``, ``lengths[i]`` of prompt i: their seconds, and the tokens."""

    def __call__(
        self, prompts: list[list[int]], lengths: list[int], *, sample: bool
    ) -> tuple[float, list[list[int]]]: ...


class Vllm:
    """vLLM in a process of its own.

    Args:
        positions: The most that a row has, prompt and new tokens.

    Raises:
        RuntimeError: where the process ends; with the end of its log.
    """

    def __init__(self, python: Path, model: str, positions: int, args: argparse.Namespace) -> None:
        self._log = Path(model) / "vllm.log"
        given = {"model": model, "dtype": args.dtype, "positions": positions}
        bind = args.bind or f"0-{torch.get_num_threads() - 1}"
        settings = {
            "VLLM_CPU_OMP_THREADS_BIND": bind,
            "VLLM_CPU_KVCACHE_SPACE": str(args.kv_gib),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "VLLM_NO_USAGE_STATS": "1",
        }
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("vllm_process.py")), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            env=environment,
        )
        self.version = str(self._reply()["ready"])

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            end = "\n".join(self._log.read_text().splitlines()[-20:])
            raise RuntimeError(f"vLLM ended with {self._process.wait()}:\n{end}")
        return json.loads(line)

    def __call__(
        self, prompts: list[list[int]], lengths: list[int], *, sample: bool
    ) -> tuple[float, list[list[int]]]:
        """Generate; see :class:`Generates`."""
        assert self._process.stdin is not None
        request = {"prompts": prompts, "lengths": lengths, "sample": sample}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        if [len(row) for row in reply["tokens"]] != lengths:
            raise RuntimeError("vLLM did not keep the lengths")
        return reply["seconds"], reply["tokens"]

    def __enter__(self) -> Vllm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def decode(model: Any, other: Generates, args: argparse.Namespace) -> list[Row]:
    """hybrid_fx (a) against vLLM (b), seconds a step at each batch size."""
    timer, rows = Timer(args.device), []

    def step(ids: list[list[int]]) -> float:
        first, last = (other(ids, [new] * len(ids), sample=False)[0] for new in (1, args.new))
        return (last - first) / (args.new - 1)

    for batch in args.batch:
        ids = prompts(model, batch, args.prompt, args.device)
        given = ids.tolist()
        ours = peers.generate(model, ids, do_sample=False)
        mine = ours(args.new)[:, args.prompt :].tolist()
        _, theirs = other(given, [args.new] * batch, sample=False)
        a: Callable[[], float] = partial(seconds_a_token, ours, args.new, timer)
        times = in_turn({"a": a, "b": partial(step, given)}, args.repeat)
        what = f"decode, batch {batch}: vLLM / hybrid_fx"
        same = mine == theirs
        rows.append(compared(what, times["a"], times["b"], batch=batch, same_tokens=same))
    return rows


def grpo(model: Any, other: Generates, args: argparse.Namespace) -> list[Row]:
    """Each way of hybrid_fx (a) against vLLM (b), seconds of the whole rollout."""
    work, timer, rows = forced.work(model, args), Timer(args.device), []
    given = work.ids.tolist()
    other(given, work.lengths, sample=True)
    for way in args.ways:
        settings, options = WAYS[way]
        more = {"disk_cache": False, **settings, **args.options}
        with hybrid_fx.hybridize(peers.twin(model), graph=args.graph, **more) as engine:
            call = partial(roll_out, engine.module, work, options(work))
            call()
            sides = {
                "a": partial(timer, call),
                "b": lambda: other(given, work.lengths, sample=True)[0],
            }
            times = in_turn(sides, args.repeat)
        row = compared(f"grpo, {way}: vLLM / hybrid_fx", times["a"], times["b"], way=way)
        rows.append(row | {f"{s}_tokens_s": 1000 * work.tokens / row[f"{s}_ms"] for s in "ab"})
    return rows


def measured(python: Path, args: argparse.Namespace) -> tuple[list[Row], str]:
    """Rows of the workloads asked for, and the version of vLLM."""
    torch.manual_seed(0)
    model = build(args.shape, dtype=getattr(torch, args.dtype), device=args.device)
    positions = max(args.prompt + args.new, args.prompt_tokens + args.longest) + 1
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with Vllm(python, folder, positions, args) as other:
            if "decode" in args.what:
                mine = peers.twin(model)
                options = {"disk_cache": False, **args.options}
                with hybrid_fx.hybridize(mine, graph=args.graph, **options):
                    rows += decode(mine, other, args)
            if "grpo" in args.what:
                rows += grpo(model, other, args)
            return rows, other.version


def main(argv: list[str] | None = None) -> int:
    """Run decode and grpo, or the one that is named; 1 where vLLM cannot be had."""
    parser = command.parser(__doc__, ("decode", "grpo"))
    parser.add_argument("--environment", default="build/peers", help="folder of vLLM's python")
    parser.add_argument("--bind", default=None, help="cores of vLLM, as 0-1")
    parser.add_argument("--kv-gib", type=int, default=2, help="memory of vLLM's KV cache")
    args = parser.parse_args(argv)
    args.what, args.repeat = args.what or ["decode", "grpo"], args.repeat or 5
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        rows, version = measured(vllm_python(Path(args.environment).absolute()), args)
    except EnvironmentFailed as error:
        print(f"{VLLM} cannot be installed here, so nothing was measured.\n{error}")
        return 1
    name = "-".join(("vllm", *args.what, args.shape, args.dtype, args.device, args.graph))
    result = Result(rows=rows, notes=("vLLM is not given new weights here, which it needs",))
    show(result, f"{name.replace('-', ' ')}, {args.repeat} turns")
    if args.save:
        plot.draw(save(result, args, name, vllm=version))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
