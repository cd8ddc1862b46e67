"""The command line: what can be chosen, what is chosen by default, and what is refused."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Defaults of the small model; ``--quick`` and ``--model`` change some.
SMALL: dict[str, Any] = {
    "digits": 2,
    "hidden": 128,
    "layers": 3,
    "warmup_steps": 1500,
    "warmup_batch": 64,
    "warmup_lr": 2e-3,
    "warmup_target": 0.4,
    "iterations": 100,
    "prompts": 32,
    "samples": 8,
    "epochs": 1,
    "lr": 1e-4,
    "held_out": 400,
    "turns": 15,
    "rows_at_once": 0,
    "threads": 1,
    "nproc": 2,
}
QUICK = {
    "digits": 1,
    "hidden": 32,
    "layers": 2,
    "warmup_steps": 60,
    "warmup_batch": 32,
    "iterations": 3,
    "prompts": 4,
    "samples": 4,
    "held_out": 20,
    "turns": 1,
}
PRETRAINED = {
    "digits": 3,
    "warmup_steps": 0,
    "warmup_batch": 16,
    "warmup_lr": 1e-5,
    "lr": 2e-6,
    "held_out": 200,
    "rows_at_once": 16,
    "threads": torch.get_num_threads(),
}
LORA_LR = {"small": 1e-3, "pretrained": 1e-4}
CONTROLS = ("frozen", "shuffled")
POSITIVE = (
    "digits",
    "hidden",
    "layers",
    "iterations",
    "prompts",
    "samples",
    "epochs",
    "held_out",
    "threads",
    "nproc",
)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> OneLineParser:
    """Return the parser; options left out are None until :func:`parse` fills them."""
    parser = OneLineParser(prog="grpo.py", description="GRPO on arithmetic with hybrid_fx.")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of weights, problems and sampling (0)")
    add(
        "--control",
        nargs="?",
        const="frozen",
        choices=CONTROLS,
        help="a run that must not improve: frozen (no optimizer step; the default of --control) or "
        "shuffled (each reward goes to a random sample)",
    )
    add("--quick", action="store_true", help="a few seconds, to see that everything runs")
    add("--model", metavar="NAME_OR_PATH", help="a causal LM to use instead of the small one")
    add("--lora", action="store_true", help="train a LoRA adapter on all linear layers")
    add("--zero", type=int, choices=range(4), metavar="STAGE", help="of DeepSpeed's ZeRO, 0 to 3")
    add("--nproc", type=int, help="processes to start with --zero (2); a launcher has its own")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 … (cpu)")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="of the weights (float32)")
    add("--threads", type=int, help="on the CPU (1, the same sums anywhere; all with --model)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="for grpo.png (out)")
    add("--explain", action="store_true", help="print what hybrid_fx rewrote")
    add("--iterations", type=int, help="of GRPO (100)")
    add("--prompts", type=int, help="per iteration (32)")
    add("--samples", type=int, help="per prompt, the group (8)")
    add("--epochs", type=int, help="updates per rollout (1)")
    add("--lr", type=float, help="of GRPO (1e-4; 2e-6 with --model; --lora has its own)")
    add("--temperature", type=float, default=1.0, help="of sampling (1.0)")
    add("--clip", type=float, default=0.2, help="of the probability ratio (0.2)")
    add("--digits", type=int, help="of the numbers to add (2; 3 with --model)")
    add("--max-new-tokens", type=int, help="longest completion (what a solution needs)")
    add("--held-out", type=int, help="problems for the accuracy (400; 200 with --model)")
    add("--warmup-steps", type=int, help="most supervised steps (1500; 0 with --model)")
    add("--warmup-target", type=float, help="accuracy that ends the warm-up (0.4)")
    add("--warmup-batch", type=int, help="rows of a supervised step (64; 16 with --model)")
    add("--warmup-lr", type=float, help="of the warm-up (2e-3; 1e-5 with --model)")
    add("--hidden", type=int, help="size of the small model (128)")
    add("--layers", type=int, help="of the small model (3)")
    add("--rows-at-once", type=int, help="rows of one backward, 0 for all (0; 16 with --model)")
    add("--turns", type=int, help="of the speed comparison, 0 for none (15)")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of ``argv``; exits with one line on stderr where they make no sense."""
    parser = build_parser()
    options = parser.parse_args(argv)
    defaults = dict(SMALL)
    if options.model is not None:
        defaults.update(PRETRAINED)
    if options.lora:
        defaults["lr"] = LORA_LR["small" if options.model is None else "pretrained"]
    if options.quick:
        defaults.update(QUICK if options.model is None else {**QUICK, "warmup_steps": 0})
    if options.zero is not None:
        defaults["turns"] = 0
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if problem := complaint(options):
        parser.error(problem)
    return options


def complaint(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the options in one line, or None."""
    for name in POSITIVE:
        if (value := getattr(options, name)) < 1:
            return f"--{name.replace('_', '-')} is {value}; it must be 1 or more"
    for name in ("warmup_steps", "rows_at_once", "turns"):
        if (value := getattr(options, name)) < 0:
            return f"--{name.replace('_', '-')} is {value}; it must be 0 or more"
    for name in ("lr", "temperature", "clip", "warmup_lr"):
        if not (value := getattr(options, name)) > 0:
            return f"--{name.replace('_', '-')} is {value}; it must be above 0"
    if options.samples < 2:
        return f"--samples is {options.samples}; a group needs 2 or more to compare"
    if options.hidden % 8:
        return f"--hidden is {options.hidden}; it must be a multiple of 8 (4 heads of even size)"
    if problem := ranks_complaint(options):
        return problem
    needed = (("matplotlib", True), ("peft", options.lora), ("deepspeed", options.zero is not None))
    for package, wanted in needed:
        if wanted and importlib.util.find_spec(package) is None:
            return f"{package} is not installed; run: pip install {package}"
    return device_complaint(options.device)


def ranks_complaint(options: argparse.Namespace) -> str | None:
    """Return why the options do not fit several processes, or None."""
    if options.zero is None:
        return (
            "--nproc needs --zero, the stage to run under"
            if options.nproc != SMALL["nproc"]
            else None
        )
    count = int(os.environ.get("WORLD_SIZE", options.nproc))
    if options.prompts % count:
        return f"--prompts is {options.prompts}; it must be a multiple of the {count} processes"
    if options.held_out < count:
        return f"--held-out is {options.held_out}; each of {count} processes needs one"
    if options.turns or options.control:
        return "--turns and --control are for one process; leave them out with --zero"
    return None


def device_complaint(name: str) -> str | None:
    """Return why ``name`` is no device to run on, or None."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"--device {name} cannot be used: {str(error).splitlines()[0]}"
    return "--device meta holds no numbers; use cpu or cuda" if device.type == "meta" else None
