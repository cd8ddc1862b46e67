"""Run checks on gloo processes; every rank runs every check, in the same order.

Processes start in seconds, as they import torch, transformers and DeepSpeed: they are kept for the
checks of other tests, until a check fails or another number of ranks is asked for.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

#: Takes the rank; raises where its claim is wrong.
Check = Callable[[int], None]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _work(rank: int, world: int, port: int, orders: Connection) -> None:
    """One rank: answer each list of checks by what went wrong, None for nothing."""
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
    while (checks := _next(orders)) is not None:
        orders.send(_wrong(rank, checks))
        gc.collect()
    os._exit(0)  # threads of the process group still run, and must not outlive the interpreter


def _next(orders: Connection) -> Sequence[Check] | None:
    """The checks that are asked for; None where those who ask have ended."""
    try:
        found: Sequence[Check] = orders.recv()
    except EOFError:
        return None
    return found


def _wrong(rank: int, checks: Sequence[Check]) -> str | None:
    """What is wrong with the first check that fails."""
    for check in checks:
        try:
            check(rank)
        except BaseException:
            return f"rank {rank}, {check}:\n{traceback.format_exc()}"
    return None


class Ranks:
    """The processes of one gloo group at a time."""

    def __init__(self) -> None:
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._orders: list[Connection] = []

    def run(self, *checks: Check, world: int = 2) -> None:
        """Run ``checks`` in ``world`` processes; raises the first failure of any of them."""
        if world != sum(process.is_alive() for process in self._processes):
            self.stop()
            self._start(world)
        for orders in self._orders:
            orders.send(checks)
        waiting = list(self._orders)
        while waiting:
            for ready in wait(waiting):
                assert isinstance(ready, Connection)
                waiting.remove(ready)
                try:
                    wrong = ready.recv()
                except EOFError:
                    wrong = f"rank {self._orders.index(ready)} died"
                if wrong:
                    self.stop()
                    raise AssertionError(wrong)

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()
        for orders in self._orders:
            orders.close()
        self._processes, self._orders = [], []

    def _start(self, world: int) -> None:
        spawn, port = multiprocessing.get_context("spawn"), _free_port()
        for rank in range(world):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(rank, world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._orders.append(ours)
