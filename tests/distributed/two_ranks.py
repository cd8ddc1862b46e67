"""Run checks on two gloo processes; every rank runs every check, in the same order."""

from __future__ import annotations

import datetime
import os
import socket
import traceback
from collections.abc import Callable, Sequence

import torch.multiprocessing

#: Takes the rank; raises where its claim is wrong.
Check = Callable[[int], None]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _work(rank: int, world: int, port: int, checks: Sequence[Check]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    import deepspeed

    # Needs a compiler and 100 s; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # A rank that fails leaves the other one waiting: not for long.
    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=120))
    for check in checks:
        try:
            check(rank)
        except BaseException:
            print(f"rank {rank}, {check}:\n{traceback.format_exc()}", flush=True)
            raise


def run(*checks: Check, world: int = 2) -> None:
    """Run ``checks`` in ``world`` processes; raises the first failure of any of them."""
    arguments = (world, _free_port(), checks)
    torch.multiprocessing.spawn(_work, args=arguments, nprocs=world)
