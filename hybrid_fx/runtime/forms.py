"""Which form of a weight products read: measured on the machine, once for each dtype.

oneDNN packs bfloat16 for some processors only, and how fast its kernels and torch's own are is
another matter on each. So products with one weight are timed in each form that it can have, for few
rows and for more, and what is usual stays unless another form is clearly faster: a machine that is
busy meanwhile shall not turn the choice. The plan of a model does not depend on it.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..cache.machine import Machine, Seconds, read_seconds, write_seconds
from ..passes.packing import PLAIN, Forms, PackForm, pack, packed_linear, packs, usual_forms

logger = logging.getLogger("hybrid_fx")

#: Outputs and inputs of the weight that is timed. Its forms together, read in turn, are more than
#: the caches of most processors hold.
_SHAPE = (8192, 1024)

#: Rows of the products that are timed.
_ROWS = (1, 4, 16)

#: Each is timed so often, but no longer than this many seconds in all.
_TIMES, _MOST_SECONDS = 7, 0.5

#: A form that is not the usual one has to be so much faster.
_CLEARLY = 1.25

_PLAIN = "plain"


def measured_forms(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    *,
    same_dtype: bool,
    directory: Path | None,
) -> Forms:
    """The form of weights of each of ``dtypes`` on a device.

    Args:
        same_dtype: Whether a packed copy must have the dtype of the weights.
        directory: Where measurements are kept; ``None``: for as long as the process lives.
    """
    usual = usual_forms(device)
    return {
        dtype: chosen(dtype, usual[dtype], _seconds(directory, dtype), same_dtype=same_dtype)
        for dtype in dtypes
        if dtype in usual
    }


def chosen(dtype: torch.dtype, usual: PackForm, seconds: Seconds, *, same_dtype: bool) -> PackForm:
    """The form that is best by ``seconds``: of each form, at each of the numbers of rows.

    Args:
        dtype: Of the weights.
        usual: What stays unless another form is clearly faster for more rows than one.
        seconds: By the name of the packed copy's dtype, or ``"plain"``.
        same_dtype: Whether that must be the dtype of the weights.
    """
    names = [name for name in seconds if not same_dtype or name in (name_of(dtype), _PLAIN)]
    best = next(name for name in (name_of(usual.dtype), name_of(dtype), _PLAIN) if name in names)
    for name in names:
        if _for_more_rows(seconds[name]) * _CLEARLY < _for_more_rows(seconds[best]):
            best = name
    if best == _PLAIN:
        return PLAIN
    expected = usual.plain_rows if best == name_of(usual.dtype) else 0
    few = seconds[_PLAIN][0] < seconds[best][0] * (_CLEARLY if expected else 1 / _CLEARLY)
    return PackForm(getattr(torch, best), plain_rows=int(few))


def name_of(dtype: torch.dtype | None) -> str:
    """What the seconds of a packed copy in ``dtype`` are called; of ``None``, the weight's."""
    return _PLAIN if dtype is None else str(dtype).removeprefix("torch.")


def _for_more_rows(seconds: Sequence[float]) -> float:
    """The geometric mean of those of more rows than one."""
    return math.prod(seconds[1:]) ** (1 / len(seconds[1:]))


def _seconds(directory: Path | None, dtype: torch.dtype) -> Seconds:
    """What was measured on this machine, in any process."""
    machine, what = Machine.here(), f"products-{name_of(dtype)}"
    kept = None if directory is None else read_seconds(directory, machine, what)
    if kept is not None and set(kept) == set(names_of(dtype)):
        return kept
    measured = _measured(machine, dtype)
    if directory is not None:
        write_seconds(directory, machine, what, measured)
    return measured


@functools.lru_cache(maxsize=16)
def _measured(machine: Machine, dtype: torch.dtype) -> Seconds:
    """What is measured on this machine, once in a process."""
    begin = time.perf_counter()
    seconds = measure(dtype)
    said = ", ".join(f"{name} {_milliseconds(row)}" for name, row in seconds.items())
    logger.info(
        "products of %s rows with a weight %s of %s took, in ms: %s (measured in %.1f s on %s)",
        ", ".join(map(str, _ROWS)),
        list(_SHAPE),
        name_of(dtype),
        said,
        time.perf_counter() - begin,
        machine.processor,
    )
    return seconds


def _milliseconds(seconds: Sequence[float]) -> str:
    return "/".join(f"{1e3 * one:.2f}" for one in seconds)


def names_of(dtype: torch.dtype) -> list[str]:
    """The forms that a weight of ``dtype`` can have on this machine's processor."""
    cpu = torch.device("cpu")
    packed = (one for one in dict.fromkeys((dtype, torch.float32)) if packs(cpu, one))
    return [*map(name_of, packed), _PLAIN]


@torch.no_grad()
def measure(dtype: torch.dtype, shape: tuple[int, int] = _SHAPE) -> Seconds:
    """Seconds of a product with a weight ``shape`` in each form, at each number of rows.

    The least of several, which the rest of the machine has disturbed least. No random numbers.
    """
    weight = torch.ones(shape, dtype=dtype, device="cpu")
    forms = {
        name: weight if name == _PLAIN else pack(weight.to(getattr(torch, name)))
        for name in names_of(dtype)
    }
    inputs = [torch.ones(rows, 1, shape[1], dtype=dtype, device="cpu") for rows in _ROWS]
    seconds = {name: [math.inf] * len(inputs) for name in forms}
    until = time.perf_counter() + _MOST_SECONDS
    for turn in range(_TIMES):
        for at, x in enumerate(inputs):
            for name, form in forms.items():  # in turn, so that none finds itself in the cache
                begin = time.perf_counter()
                packed_linear(x, form, None)
                taken = time.perf_counter() - begin
                seconds[name][at] = min(seconds[name][at], max(taken, 1e-9))
        if turn > 1 and time.perf_counter() > until:
            break
    return seconds
