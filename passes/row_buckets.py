"""Products of packed weights run on few numbers of rows.

oneDNN makes a kernel for each number of rows that a weight meets, and keeps it: with torch 2.13 on
a processor with AMX, 0.6 to 1.5 MiB for each weight's shape and number of rows, in machine code, in
its cache of 1,024 kernels, and in tables that are never emptied. Nothing in torch gives it back. So
rows are filled up to one of 39 numbers, and of many rows a piece of ``MOST`` runs at a time. A row
does not depend on the rows beside it: what fills up is zeros, and cut off. Shapes: N rows,
E inputs, F outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

#: Rows of the largest product. A row costs no less in a larger one.
MOST = 512

#: Up to so many rows, each number has a kernel of its own; the steps are no smaller.
_LEAST = 8


def bucket(rows: int) -> int:
    """The number of rows, 1 to ``MOST``, that a product of ``rows`` rows runs on.

    An eighth of the power of two below is the step, and no less than 8: of 100 to 1,300 rows, 2 %
    more are computed.
    """
    step = 1 if rows <= _LEAST else max(_LEAST, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def by_rows(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``product(x)`` of x [..., E], made of few numbers of rows.

    Args:
        product: [..., E] to [..., F], each row by itself.
        x: With at least one row.

    Returns:
        [..., F].
    """
    rows = x.numel() // x.shape[-1]
    if rows <= MOST and rows == bucket(rows):
        return product(x)
    flat = x.reshape(rows, x.shape[-1])
    if rows <= MOST:
        out = _filled_up(product, flat)
    else:
        first = product(flat[:MOST])
        out = first.new_empty(rows, first.shape[1])
        out[:MOST] = first
        for start in range(MOST, rows, MOST):
            out[start : start + MOST] = _filled_up(product, flat[start : start + MOST])
    return out.view(*x.shape[:-1], out.shape[1])


def _filled_up(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``product(x)`` [N, F] of x [N, E], N at most ``MOST``."""
    rows = x.shape[0]
    more = bucket(rows) - rows
    return product(F.pad(x, (0, 0, 0, more)))[:rows] if more else product(x)
