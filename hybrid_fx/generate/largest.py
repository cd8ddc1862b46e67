"""The place of the largest number of a row, which on a CPU costs several times finding the number.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Numbers in a block: its largest is found by vector instructions, its place in one block alone.
_BLOCK = 128
#: Below so many blocks, looking twice costs more than it saves.
_FEWEST = 32


def first_largest(scores: Tensor) -> Tensor:
    """``scores.argmax(-1)``: the first of the largest numbers in each row, or its first NaN.

    Args:
        scores: ``[N, V]``, V at least 1.

    Returns:
        int64 ``[N]``.
    """
    width = scores.shape[1]
    if scores.device.type != "cpu" or width < _FEWEST * _BLOCK:
        return scores.argmax(-1)
    whole = width - width % _BLOCK
    largest = scores[:, :whole].reshape(-1, whole // _BLOCK, _BLOCK).amax(-1)
    if whole < width:
        largest = torch.cat((largest, scores[:, whole:].amax(-1, keepdim=True)), 1)
    # The last block is looked for in the last columns: those of them that belong to the block
    # before are smaller, or that block would have been the first.
    first = (largest.argmax(-1, keepdim=True) * _BLOCK).clamp_(max=width - _BLOCK)
    columns = first + torch.arange(_BLOCK, device=scores.device)
    return first[:, 0] + scores.gather(1, columns).argmax(-1)
