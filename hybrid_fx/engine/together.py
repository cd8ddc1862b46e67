"""Steps that ranks which compute one model take together, so that one's error is one of all."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import HybridError, RankError
from .source import Source

#: Says nothing about a plan: what ran out may be there the next time.
NO_MEMORY = (MemoryError, torch.OutOfMemoryError)


def fault_of(step: Callable[[], object]) -> object:
    """The error that ``step`` ends in, where it says something about the plan; or ``None``."""
    try:
        step()
    except (*NO_MEMORY, RankError):
        raise
    except Exception as error:
        return error
    return None


class Together:
    """What is found wrong on one of the ranks is wrong on all of them. Alone, a step is a step."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def shared(self, wrong: object) -> object:
        """``wrong``, or that another rank has found something; ``None`` where none has."""
        (some,) = self._source.any(wrong is not None)
        return "another rank found it wrong, see its log" if some and wrong is None else wrong

    def all(self, step: Callable[[], object]) -> None:
        """Do ``step``; where it fails on one of the ranks, raise on all of them."""
        wrong = self.shared(fault_of(step))
        if wrong is not None:
            raise wrong if isinstance(wrong, Exception) else HybridError(str(wrong))
