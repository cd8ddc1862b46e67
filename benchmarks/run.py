"""Speed, as ratios measured in turn in one run: ``python benchmarks/run.py --help``.

    python benchmarks/run.py                              all workloads on q05 in bfloat16
    python benchmarks/run.py decode --shape small --batch 1 4
    python benchmarks/run.py passes --shape llama-110m    each optional pass, on against off

A workload prints a table; ``--save`` also writes it, dated, with the machine and the versions, to
``benchmarks/results``, and a picture beside it. ``--clock cpu --threads 1`` counts processor time
instead of the clock's: for machines that others use too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable

import cold
import decode
import each_pass
import grpo
import iteration
import peers
import plot
import soak
import switch
import torch
from learning import LEARNING
from measure import CLOCKS
from record import Result, save, show
from shapes import SHAPES

#: Name to the workload and how often each side runs where --repeat does not say.
WORKLOADS: dict[str, tuple[Callable[[argparse.Namespace], Result], int]] = {
    "decode": (decode.run, decode.REPEAT),
    "grpo": (grpo.run, grpo.REPEAT),
    "switch": (switch.run, switch.REPEAT),
    "cold": (cold.run, cold.REPEAT),
    "iteration": (iteration.run, iteration.REPEAT),
    "passes": (each_pass.run, each_pass.REPEAT),
    "soak": (soak.run, soak.REPEAT),
}
#: What ``make bench`` runs.
DEFAULT = tuple(name for name in WORKLOADS if name not in ("passes", "soak"))


def _known(workloads: tuple[str, ...]) -> Callable[[str], str]:
    def workload(name: str) -> str:
        if name not in workloads:
            known = ", ".join(workloads)
            raise argparse.ArgumentTypeError(f"no workload {name!r}; there are {known}")
        return name

    return workload


def parser(text: str | None, workloads: Iterable[str]) -> argparse.ArgumentParser:
    """The command line of a script with the documentation ``text``, for some workloads."""
    top, _, rest = (text or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=top, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # Checked by hand: with nargs="*", choices would refuse to have none.
    add("what", nargs="*", type=_known(tuple(workloads)), metavar="workload", default=None)
    add("--shape", choices=sorted(SHAPES), default="q05")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--device", default="cpu")
    add("--graph", choices=("eager", "inductor", "cudagraphs"), default="eager")
    add("--peers", nargs="*", choices=peers.NAMES, default=peers.NAMES)
    add("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="of decode and passes")
    add("--prompt", type=int, default=64, help="tokens of the other workloads")
    add("--new", type=int, default=48, help="tokens of decode")
    add("--prompts", type=int, default=4, help="of grpo, iteration and soak")
    add("--prompt-tokens", type=int, default=256, help="of grpo, iteration and soak")
    add("--samples", type=int, default=8, help="of each prompt of grpo and iteration")
    add("--longest", type=int, default=128, help="new tokens of grpo, iteration and soak")
    add("--rows-at-once", type=int, default=8, help="of a backward of iteration")
    learning = tuple(LEARNING)
    add("--learning", nargs="+", choices=learning, default=learning, help="of iteration")
    add(
        "--ways",
        nargs="+",
        choices=grpo.WAYS,
        default=tuple(grpo.WAYS),
        help="of grpo; the last one is that of iteration",
    )
    add("--adapters", nargs="+", choices=("none", "LoRA"), default=("none", "LoRA"))
    add("--layers", type=int, nargs="+", default=[4, 12, 24], help="of cold")
    add("--repeat", type=int, default=None, help="turns; each workload has its own default")
    add("--passes", nargs="+", choices=each_pass.PASSES, default=each_pass.PASSES)
    add("--batch-tokens", type=int, default=1024, help="generate_batch: tokens in one forward")
    add("--options", type=json.loads, default={}, help='of hybridize: \'{"lora": "side"}\'')
    add("--clock", choices=sorted(CLOCKS), default="wall")
    add("--threads", type=int, default=None)
    add("--save", action="store_true")
    add("--folder", default=None, help="for --save, instead of benchmarks/results")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the named workloads one after the other, or all of :data:`DEFAULT`."""
    given = parser(__doc__, WORKLOADS).parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    for name in given.what or DEFAULT:
        run, repeat = WORKLOADS[name]
        args = argparse.Namespace(**{**vars(given), "what": name})
        args.repeat = given.repeat or repeat
        result = run(args)
        words = (name, args.shape, args.dtype, args.device, args.graph)
        show(result, f"{', '.join(words)}, {args.clock} time, {args.repeat} turns")
        if args.save:
            plot.draw(save(result, args, "-".join(words)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
