"""Decode steps replayed from recordings: one of each number of rows serves many positions.

A recording runs the plan's own decode source, with an attention that reads the first columns of
each row and masks those that do not count (:mod:`.attend_at`). Where rows have outgrown these,
another recording reads twice as many: what is reserved and not used costs nothing. What differs
from step to step lies in memory of its own: ids, positions, the column that is written, which
columns are valid. Prepared tensors and the KV workspace are read where they lie, so a weight switch
that refills them keeps the recordings; where they lie elsewhere, steps are recorded anew.

The first step of a recording is served by the graph as it stands, and the recording is held
against it; whatever cannot be recorded goes on that way.

Legend: B rows of the call, N rows of a recording, C columns that it reads, P positions a row,
V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..passes.packing import lent
from ..plan.plan import Manifest
from .attend_at import masks_at
from .closeness import allowed_distance, distance_of
from .recording import NotRecordableError, Recorder, Recording
from .workspace import STRIDE, Workspace

logger = logging.getLogger("hybrid_fx")

#: Recordings to keep; those that served longest ago go first.
_MOST = 64

#: N, C and P of a recording.
Size = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One decode step of B rows.

    Attributes:
        eager: Does it without a recording.
        ids, positions: int64 [B, 1].
        valid: bool [B, P], which columns are valid; True behind ``at``. ``None``: all are.
        at: The column that is written.
    """

    eager: Callable[[], Tensor]
    ids: Tensor
    positions: Tensor
    valid: Tensor | None
    at: int


class Inputs:
    """What a recorded step reads and others write: ``ids`` and ``positions`` int64 [N, 1], ``at``
    int64 [1], ``valid`` bool [N, C]. Rows behind those of a session hold what they held."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns = rows, columns
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.valid = torch.ones(rows, columns, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(t.nbytes for t in (self.ids, self.positions, self.at, self.valid))

    def look(self, valid: Tensor | None) -> None:
        """Take which columns are valid, [B, P] of B <= N rows, P >= C; ``None``: all are."""
        if valid is None:
            self.valid.fill_(True)
        else:
            self.valid[: len(valid)].copy_(valid[:, : self.columns])

    def put(self, step: DecodeStep) -> None:
        """Take the tokens of a step and the column that they stand in."""
        rows = len(step.ids)
        self.ids[:rows].copy_(step.ids)
        self.positions[:rows].copy_(step.positions)
        self.at.fill_(step.at)


class RecordedDecode:
    """The recorded decode steps of one plan, on one workspace.

    Args:
        decode: The plan's decode function, with ``attend_at`` in the place of ``attend_one``.
        manifest: Of the plan.
        recorder: Of this object alone.
        workspace: Of the sessions.
        device: Where the model lives.

    Attributes:
        failure: Why no step is recorded any more, or "".
    """

    def __init__(
        self,
        decode: Callable[..., Tensor],
        manifest: Manifest,
        recorder: Recorder,
        workspace: Workspace,
        device: torch.device,
    ) -> None:
        self._decode = decode
        self._recorder = recorder
        self._workspace = workspace
        self._device = device
        self._windows = sorted({layer.window or 0 for layer in manifest.kv})
        self._dtype = getattr(torch, manifest.kv[0].dtype) if manifest.kv else torch.float32
        self._allowed = allowed_distance(manifest)
        self._kept: dict[Size, tuple[Inputs, Recording]] = {}
        self._prepared: Sequence[Tensor] = ()
        self._places: Sequence[Any] = ()  # of what is prepared
        self._recorded_on: tuple[Any, ...] = ()
        self._sizes: set[int] = set()
        self._current: tuple[Inputs, Recording] | None = None
        self.failure = ""

    def __len__(self) -> int:
        """How many recordings there are."""
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes that the recordings hold, as far as they know."""
        return sum(inputs.nbytes + recording.nbytes for inputs, recording in self._kept.values())

    def begin(self, prepared: Sequence[Tensor], rows: int, *, padded: bool) -> None:
        """A session begins.

        Args:
            prepared: Tensors of the weights as they are.
            rows: B at its beginning.
            padded: Whether a row may be computed beside rows that nobody wants.
        """
        self._prepared, self._places = prepared, [_place(tensor) for tensor in prepared]
        self._current = None
        powers = (1 << power for power in range((rows - 1).bit_length()))
        self._sizes = {*powers, rows} if padded else set()

    def step(self, step: DecodeStep, *, moved: bool) -> Tensor:
        """Do one step.

        Args:
            moved: Whether rows, memory or ``valid`` may be others than those of the step before.

        Returns:
            [B, 1, V], memory of its own.
        """
        if self.failure:
            return step.eager()
        if moved or self._current is None or step.at >= self._current[0].columns:
            self._current = self._found(len(step.ids), step.at)
            if self._current is None:
                return self._first(step)
            self._current[0].look(step.valid)
        inputs, recording = self._current
        inputs.put(step)
        return recording.replay()[: len(step.ids)].clone()

    def release(self) -> None:
        """Give up all recordings, and what they hold."""
        self._prepared, self._places, self._recorded_on = (), (), ()
        self._drop()

    def _drop(self) -> None:
        self._current = None
        self._kept.clear()
        self._recorder.release()

    def _size(self, rows: int, at: int) -> Size:
        """For a step of so many rows: behind them stand rows that nobody reads."""
        pitch, most = self._workspace.pitch, self._workspace.most_rows
        fit = min((size for size in self._sizes if rows <= size <= most), default=rows)
        columns = STRIDE
        while columns <= at:
            columns *= 2
        return fit, min(columns, pitch), pitch

    def _found(self, rows: int, at: int) -> tuple[Inputs, Recording] | None:
        """The recording for so many rows, where there is one on this memory."""
        memory = (self._places, self._workspace.generation)
        if memory != self._recorded_on:
            self._drop()
            self._recorded_on = memory
        size = self._size(rows, at)
        found = self._kept.pop(size, None)
        if found is not None:
            self._kept[size] = found  # as the latest
        return found

    def _first(self, step: DecodeStep) -> Tensor:
        """A step that is recorded; what it returns comes from the graph as it stands."""
        logits = step.eager()
        try:
            size = self._size(len(step.ids), step.at)
            inputs = Inputs(*size[:2], self._device)
            inputs.look(step.valid)
            inputs.put(step)
            recording = self._record(inputs)
            self._prove(recording.replay()[: len(step.ids)], logits)
        except Exception as error:  # not of the step itself, which has just run
            self._fail(error)
            return step.eager()  # once more: what was tried has written keys and values
        self._current = self._kept[size] = inputs, recording
        if len(self._kept) > _MOST:
            del self._kept[next(iter(self._kept))]
        return logits

    def _record(self, inputs: Inputs) -> Recording:
        if elsewhere := [t.device for t in self._prepared if t.device != self._device]:
            raise NotRecordableError(f"a prepared tensor lies on {elsewhere[0]}")
        memory, prepared = self._workspace.first(inputs.rows), self._prepared
        pitch = self._workspace.pitch

        def step() -> Tensor:
            masks = masks_at(inputs.valid, inputs.at, self._windows, self._dtype)
            fixed = (inputs.ids, inputs.positions, inputs.at, masks, pitch, 1)
            return self._decode(*fixed, prepared, *memory)

        with torch.no_grad():
            return self._recorder.record(step)

    def _prove(self, got: Tensor, wanted: Tensor) -> None:
        """Hold the first replay of a recording against the step that it repeats."""
        if bool(wanted.isnan().any()):
            return  # of weights that hold NaN nothing can be told
        distance = distance_of(got, wanted)
        if not distance <= self._allowed:
            raise NotRecordableError(
                f"its logits differ by {distance:.1e} from those of the graph as it stands, "
                f"allowed {self._allowed:.0e}"
            )

    def _fail(self, error: Exception) -> None:
        kind = "" if isinstance(error, NotRecordableError) else f"{type(error).__name__}: "
        self.failure = kind + str(error).strip().split("\n")[0]
        self._drop()
        logger.warning("decode steps are not recorded, and run as they are: %s", self.failure)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, as far as kernels are told; packed ones keep it in their own way."""
    if tensor.is_mkldnn:
        few = lent(tensor)
        parts = () if few is None else few.parts
        return (torch.ops.mkldnn.data_ptr(tensor), *(part.data_ptr() for part in parts))
    return tensor.data_ptr(), tensor.stride()
