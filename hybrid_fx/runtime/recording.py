"""Record a function over fixed memory, and replay it: CUDA graphs, behind a seam of one file.

A recording repeats the same kernels on the same addresses with the same numbers; only what lies in
that memory may differ. So a step can be recorded where nothing on the host looks at a result, and
whatever changes from step to step is in tensors. Tried with the API of torch 2.11 and 2.13; it has
not yet run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ConfigError

#: What is recorded: takes nothing, reads and writes fixed memory, returns one tensor.
Step = Callable[[], Tensor]


class Recording(Protocol):
    """One recorded step.

    Attributes:
        nbytes: Bytes that it holds beside the memory that it was given.
    """

    nbytes: int

    def replay(self) -> Tensor:
        """Do the step again. The result is in the recording's own memory, until the next replay."""


class Recorder(Protocol):
    """Makes recordings that may share memory; one step is replayed at a time."""

    def record(self, step: Step) -> Recording:
        """Record a step. It runs several times meanwhile, on the inputs as they are.

        Raises:
            NotRecordableError: for a step that cannot be replayed.
        """

    def release(self) -> None:
        """All recordings are gone: give back what they shared."""


class NotRecordableError(RuntimeError):
    """A step does what no recording can hold."""


_TAGS = {
    torch.Tag.data_dependent_output: "reads a result on the host",
    torch.Tag.dynamic_output_shape: "makes a shape that depends on data",
    torch.Tag.nondeterministic_seeded: "draws random numbers",
}
_INDEXING = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index".split())
_COPIES = frozenset("_to_copy copy_ copy".split())


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Meanwhile, an operation that a CUDA graph cannot hold raises, with its name.

    It sees operators of torch, on any device: before a capture, which an error inside would leave
    broken, and on a CPU.

    Args:
        device: Where all of the memory is.

    Raises:
        NotRecordableError: see above.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        name = func._schema.name.partition("::")[2]
        for problem in self._problems(name, func, args, given):
            raise NotRecordableError(f"{name} {problem}")
        result = func(*args, **given)
        if name in _COPIES and result.device != self._device:
            raise NotRecordableError(f"{name} copies to {result.device}")
        return result

    def _problems(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[str]:
        if name == "lift_fresh":
            yield "makes a tensor of numbers on the host"
        if name in _INDEXING:
            if any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1])):
                yield "indexes by a mask, whose shape depends on data"
        elif name == "nonzero_static" or "attention" in name or kwargs.get("output_size"):
            pass  # of a fixed shape, and without dropout nothing is drawn
        else:
            yield from (said for tag, said in _TAGS.items() if tag in func.tags)
        for tensor in tensors_in((args, kwargs)):
            if tensor.device != self._device:
                yield f"takes a tensor from {tensor.device}"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))


#: A process captures one graph at a time.
_CAPTURING = threading.Lock()


class _CudaRecording:
    def __init__(self, graph: Any, result: Tensor, nbytes: int) -> None:
        self._graph, self._result, self.nbytes = graph, result, nbytes

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._result


class CudaRecorder:
    """CUDA graphs in one memory pool.

    They are captured on one stream of its own, as libraries hold memory for each stream that they
    were ever used on. That of torch is on whichever GPU captured first, for the whole process.

    Args:
        device: A GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None

    def record(self, step: Step) -> Recording:
        """See :class:`Recorder`."""
        cuda: Any = torch.cuda  # untyped in parts
        with _CAPTURING, torch.no_grad(), cuda.device(self._device):
            self._stream = self._stream or cuda.Stream(self._device)
            self._pool = self._pool or cuda.graph_pool_handle()
            stream, here = self._stream, cuda.current_stream(self._device)
            stream.wait_stream(here)
            try:
                with cuda.stream(stream):
                    with Watch(self._device):
                        step()
                    step()  # as it will be captured: libraries have chosen kernels and memory then
            finally:
                here.wait_stream(stream)  # what was queued writes keys and values, error or not
            held, graph = self._held(), cuda.CUDAGraph()
            # Other threads may allocate meanwhile.
            options = {"pool": self._pool, "capture_error_mode": "thread_local"}
            # Where a capture fails, torch leaves its stream the current one.
            with cuda.stream(here), cuda.graph(graph, stream=stream, **options):
                result = step()
        return _CudaRecording(graph, result, self._held() - held)

    def release(self) -> None:
        """See :class:`Recorder`."""
        self._pool = None  # one that nothing uses any more cannot be captured into again

    def _held(self) -> int:
        """Bytes of the pool; 0 where torch cannot tell."""
        cuda: Any = torch.cuda
        if cuda.get_allocator_backend() != "native":
            return 0
        segments = cuda.memory_snapshot(include_traces=False)
        return sum(s["total_size"] for s in segments if s.get("segment_pool_id") == self._pool)


#: Kind of device to what records there.
RECORDERS: Mapping[str, Callable[[torch.device], Recorder]] = MappingProxyType(
    {"cuda": CudaRecorder}
)


def recorder_of(device: torch.device) -> Recorder | None:
    """A new recorder for a device; ``None`` for one on which nothing is recorded."""
    make = RECORDERS.get(device.type)
    return None if make is None else make(device)


def check_records(graph: str, device: torch.device) -> None:
    """Refuse to record where that cannot be.

    Args:
        graph: The option of that name.
        device: Where the model is, or will be.

    Raises:
        ConfigError: naming the device, and the remedy.
    """
    if graph == "cudagraphs" and device.type not in RECORDERS:
        raise ConfigError(
            f'graph="cudagraphs" records on {", ".join(RECORDERS)}, and the model is on {device}; '
            'move it there first, or set graph="eager" (in a DeepSpeed config, '
            "hybrid_engine.enable_cuda_graph to false)"
        )
