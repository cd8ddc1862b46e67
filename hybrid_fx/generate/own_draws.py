"""Draws that belong to a sequence: they depend on its number and step, and on no other row.

Each token takes one uniform number, of a counter-based generator (SplitMix64: Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014), and the inverse of the cumulated
distribution. No noise of the size of the vocabulary is drawn.

Legend: N rows that run, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.moving import to_device
from .choose import Memory, probabilities

#: Probabilities that are summed at a time; the token is then looked for in one such block.
_BLOCK = 512

_WORD = 2**64 - 1
_ODD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio


class OwnDraws:
    """One draw a row and step; see :class:`~hybrid_fx.generate.choose.Choose`.

    Takes one number off torch's global generator, whatever is drawn after.
    """

    def __init__(self) -> None:
        self._seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        self._step = 0
        self._probabilities = Memory()

    def __call__(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        p = probabilities(scores, self._probabilities)
        numbers = [uniform(self._seed, row, self._step) for row in rows]
        self._step += 1
        on_host = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return inverse(p, to_device(on_host, p.device))


def uniform(seed: int, row: int, step: int) -> float:
    """A number in [0, 1), a multiple of 2**-53."""
    stream = _mixed(seed + (row + 1) * _ODD & _WORD)
    return (_mixed(stream + (step + 1) * _ODD & _WORD) >> 11) * 2.0**-53


def _mixed(word: int) -> int:
    """A permutation of the 64-bit words, each bit of which depends on all bits of its argument."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def inverse(p: Tensor, u: Tensor) -> Tensor:
    """The first token at which the cumulated probability exceeds ``u`` times the whole.

    Args:
        p: ``[N, V]``, at least 0, more than 0 somewhere in each row; need not sum to 1.
        u: float64 ``[N]`` in [0, 1).

    Returns:
        int64 ``[N]``, a token of positive probability in each row.
    """
    size = p.shape[1]
    whole = size - size % _BLOCK
    sums = [p[:, :whole].view(len(p), -1, _BLOCK).sum(-1)] if whole else []
    sums += [p[:, whole:].sum(-1, keepdim=True)] if whole < size else []
    edges = torch.cat(sums, 1).double().cumsum(1)
    at = _first_above(edges, u[:, None] * edges[:, -1:])
    before = torch.where(at > 0, edges.gather(1, (at - 1).clamp_min(0)), 0.0)
    rest = u[:, None] * edges[:, -1:] - before
    columns = at * _BLOCK + torch.arange(min(_BLOCK, size), device=p.device)
    block = p.gather(1, columns.clamp_max(size - 1)).double().masked_fill_(columns >= size, 0.0)
    # The sum of a block and its cumulated end were added in different orders.
    inside = block.cumsum(1)
    share = rest / (edges.gather(1, at) - before)
    return (at * _BLOCK + _first_above(inside, share * inside[:, -1:])).squeeze(1)


def _first_above(edges: Tensor, target: Tensor) -> Tensor:
    """int64 ``[N, 1]``: where edges ``[N, M]`` first exceed the target ``[N, 1]``.

    A target that rounding put at the last edge, or beyond it, stands just below.
    """
    below = torch.nextafter(edges[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(edges, torch.minimum(target, below), right=True)
