"""The same run on several processes, under DeepSpeed: who takes which part, and how they start.

Each rank samples and learns from prompts of its own, and DeepSpeed takes the mean of their
gradients; rank 0 warms the model up, and prints.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among ``count`` of them; one is a run without DeepSpeed."""

    rank: int = 0
    count: int = 1

    def share(self, rows: Sequence[_T]) -> list[_T]:
        """This rank's part of ``rows``; all parts are of one size."""
        return list(rows[: len(rows) // self.count * self.count][self.rank :: self.count])

    def mean(self, value: float) -> float:
        """The mean of ``value`` over ranks. Collective."""
        if self.count == 1:
            return value
        total = torch.tensor(value)
        torch.distributed.all_reduce(total)
        return float(total) / self.count


def started() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def this_rank(options: argparse.Namespace) -> Ranks:
    """This process, as its launcher says; alone without ``--zero``."""
    if options.zero is None:
        return Ranks()
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def start(options: argparse.Namespace, run: Callable[[argparse.Namespace], object]) -> None:
    """Run ``run(options)`` in ``options.nproc`` processes, and wait for all of them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    arguments = (options.nproc, port, options, run)
    torch.multiprocessing.spawn(_one, args=arguments, nprocs=options.nproc)


def _one(
    rank: int,
    count: int,
    port: int,
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace], object],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    run(options)
    if torch.distributed.is_initialized():  # its threads must not outlive the interpreter
        torch.distributed.destroy_process_group()


def place(options: argparse.Namespace) -> None:
    """Choose this rank's device; before DeepSpeed is imported, which looks at it."""
    if options.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif options.device == "cuda":
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(options.device)


def ds_config(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's config: the stage, AdamW, and the hybrid engine."""
    rows = options.prompts // ranks.count * options.samples
    adam = {"lr": options.lr, "weight_decay": 0.0, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": {"stage": options.zero},
        "bf16": {"enabled": options.dtype == "bfloat16"},
        "fp16": {"enabled": options.dtype == "float16"},
        "optimizer": {"type": "AdamW", "params": adam},
        "gradient_clipping": 1.0,
        "hybrid_engine": {"enabled": True},
        "hybrid_fx": {"sync_rng": "none"},  # every rank samples for problems of its own
    }


class DeepSpeedUpdate:
    """One update by DeepSpeed, from one backward or several."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``; ``last`` of this update's."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss)

    def step(self) -> None:
        """Clip and step. Collective."""
        self._engine.step()
