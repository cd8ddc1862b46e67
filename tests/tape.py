"""A recorder for a CPU that means what a CUDA graph means, and refuses what one would.

Every operator of a step is noted with its very arguments. A replay runs these again on the same
memory, with the numbers and sizes of then: nothing of the Python that called them. The results are
put where those of the first run lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hybrid_fx.runtime import recording
from hybrid_fx.runtime.recording import Step, Watch, tensors_in

#: Kind of device that the tests of recorded steps run on.
KIND = "cpu"


class _Taping(Watch):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.notes: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.notes.append((func, args, kwargs or {}, list(tensors_in(result))))
        return result


class Tape:
    """One recorded step.

    Attributes:
        replays: How often it was replayed.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        with _Taping(device) as taping:
            self._result = step()
        self._notes = taping.notes
        self.replays = 0
        self.nbytes, known = 0, set[int]()
        for _, args, kwargs, results in self._notes:
            known |= {_storage(tensor) for tensor in tensors_in([args, kwargs])}
            for tensor in results:
                if _storage(tensor) not in known:  # made here
                    self.nbytes += tensor.untyped_storage().nbytes()
                    known.add(_storage(tensor))

    def replay(self) -> Tensor:
        self.replays += 1
        for func, args, kwargs, results in self._notes:
            again = func(*args, **kwargs)
            for old, new in zip(results, tensors_in(again), strict=True):
                if _storage(old) != _storage(new):  # else a view, or written in place
                    old.copy_(new)
        return self._result


def _storage(tensor: Tensor) -> int:
    return 0 if tensor.is_mkldnn else tensor.untyped_storage()._cdata


class TapeRecorder:
    """See :class:`hybrid_fx.runtime.recording.Recorder`."""

    #: Of all recorders, since the test began.
    tapes: ClassVar[list[Tape]]
    released: ClassVar[int]

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, step: Step) -> Tape:
        step()
        made = Tape(step, self._device)
        type(self).tapes.append(made)
        return made

    def release(self) -> None:
        type(self).released += 1


@contextmanager
def taped() -> Iterator[type[TapeRecorder]]:
    """Meanwhile, a device of ``KIND`` records; what is made shows in the class that is given."""

    class Recorders(TapeRecorder):
        tapes: ClassVar[list[Tape]] = []
        released = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "RECORDERS", {KIND: Recorders})
        yield Recorders
