"""Run a plan: its prepare graph once a weight version, prefill and decode on the workspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineBusyError, EngineClosedError, InputError
from ..passes.collectives import Group
from ..passes.folding import unmeasured_dora, unmeasured_lora
from ..passes.operators import OPERATORS
from ..passes.packing import Forms, usual_forms
from ..plan.plan import Plan, load_functions
from .attend_at import attend_at
from .lowering import Lowering, is_weight
from .peak import measure_peak_bytes, prepare_peak_bytes
from .prepared import Gather, Measured, PreparedTensors
from .recorded import RecordedDecode
from .recording import Recorder
from .scratch import Scratch
from .session import Graph, PlanSession, Timer
from .shared_rows import SharedRows, writes_in_place
from .streamed import Stream, by_layer
from .workspace import Workspace

#: Said to a call from inside another one; those of other threads wait for their turn.
BUSY = (
    "another generate is running on this engine, and the memory of its rows is in use; from a "
    "processor, criterion or streamer, generate by another model, or when that call has ended"
)


class PlanRunner:
    """The functions of a plan with the memory they need. One session at a time.

    Attributes:
        holds_keys: Whether its sessions take keys and values, and give them back.
        forms: What is packed, and how.

    Args:
        plan: What to run; its sources are checked before they are executed.
        device: Where the model lives.
        lower: Applied to each layer function, see :mod:`.lowering`; ``None`` runs it as written.
        limit: The model's maximum positions, a bound for how far the workspace grows ahead.
        max_out_tokens: Positions a row to reserve at least.
        timer: Opens the spans in which sessions count prefill and decode.
        group: Of the ranks that compute the model together, for a plan of several.
        gather: Makes sharded weights whole; ``None`` where all are.
        stream: Does so for a plan whose layers gather their own weights.
        rows: Where weights that are stacked lie in one buffer; ``None`` copies them.
        measures: Whether a fold measures what rounding takes of it, for :attr:`errors`.
        recorder: Records decode steps, of a plan that one process runs by itself; ``None`` runs
            each as it is.
        forms: What is packed, and how; ``None`` is :func:`~hybrid_fx.passes.packing.usual_forms`.
    """

    holds_keys = True

    def __init__(
        self,
        plan: Plan,
        *,
        device: torch.device,
        lower: Lowering | None = None,
        limit: int | None = None,
        max_out_tokens: int | None = None,
        timer: Timer,
        group: Group | None = None,
        gather: Gather | None = None,
        stream: Stream | None = None,
        rows: SharedRows | None = None,
        measures: bool = True,
        recorder: Recorder | None = None,
        forms: Forms | None = None,
    ) -> None:
        if (plan.manifest.ranks > 1) != (group is not None):
            raise InputError(
                f"the plan is for {plan.manifest.ranks} ranks, group is {group!r}; give a plan of "
                "several ranks their group, and no other"
            )
        self._group = () if group is None else (group,)
        self.plan = plan
        self.device = device
        self._limit = limit
        self._presize = max_out_tokens or 0
        self._timer = timer
        self._gather = gather
        self._scratch = Scratch()
        table: dict[str, Callable[..., Any]] = dict(OPERATORS)
        if gather is not None:
            table["gather"] = gather
        if not measures:
            table |= {"measured_lora": unmeasured_lora, "measured_dora": unmeasured_dora}
        for name in ("measured_lora", "measured_dora"):
            table[name] = partial(table[name], empty=self._scratch.empty)
        if rows is not None and not writes_in_place(plan.sources["prepare"]):
            table["concat_rows"] = rows.concat_rows
        self._stream = stream if plan.manifest.streamed else None
        self._shards: list[tuple[Tensor, ...]] = []
        if self._stream is not None:
            table |= {"issue_gather": self._stream.issue, "wait_gather": self._stream.wait}
        self._functions = {
            stage: load_functions(source, table, name=stage)
            for stage, source in plan.sources.items()
        }
        self._lowered = lower is not None
        if lower is not None:
            for stage in ("prefill", "decode"):
                for name, function in self._functions[stage].items():
                    if name != stage:
                        function.__globals__[name] = lower(function)
        self.workspace = Workspace(plan.manifest.kv, device, recorded=recorder is not None)
        #: Recordings of decode steps; ``None`` where none are to be made.
        self.recorded: RecordedDecode | None = None
        if recorder is not None:
            fixed = table | {"attend_one": attend_at}
            step = load_functions(plan.sources["decode"], fixed, name="recorded decode")["decode"]
            self.recorded = RecordedDecode(step, plan.manifest, recorder, self.workspace, device)
        self.forms = usual_forms(device) if forms is None else forms
        self.prepared = PreparedTensors(
            plan.manifest.prepared, gather, rows, table["concat_rows"], self.forms
        )
        self._measured = Measured()
        self._open: PlanSession | None = None
        #: Whether a row may be computed beside other rows than those of its call: a probe tells.
        self.rows_apart = False
        #: Whether embeddings may stand in for ids; None: not yet held against the module.
        self.takes_embeds: bool | None = None if plan.manifest.embeds else False

    @property
    def prepare_peak_bytes(self) -> int:
        """See :func:`.peak.prepare_peak_bytes`."""
        gathers = self._gather is not None
        return prepare_peak_bytes(
            self.plan.manifest, self.device, gathers=gathers, forms=self.forms
        )

    @property
    def measure_peak_bytes(self) -> int:
        """See :func:`.peak.measure_peak_bytes`, of :meth:`measure`."""
        gathers = self._gather is not None
        return measure_peak_bytes(self.plan.manifest, self.device, gathers=gathers)

    @contextmanager
    def _weights(self, tensors: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
        """The arguments of the prepare graph, while it runs."""
        weights = [tensors[weight.name] for weight in self.plan.manifest.weights]
        if self._gather is not None:
            self._gather.begin(weights, self._timer)
        try:
            yield weights
        finally:
            self._scratch.release()
            if self._gather is not None:
                self._gather.end()

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the prepared tensors of the current weights, given by qualified name."""
        if self._stream is not None:
            self.prepared.release()  # memory is short: nothing stands beside what is made anew
        self.prepared.begin([tensors[weight.name] for weight in self.plan.manifest.weights])
        with torch.no_grad(), self._weights(tensors) as weights:
            self._measured = Measured()
            stores = (self.prepared, self._measured)[: 2 if self.plan.manifest.lora else 1]
            self._functions["prepare"]["prepare"](weights, *stores)
        self.prepared.finish()
        self._shards = by_layer(self.plan.manifest.streamed, tensors)
        if self._stream is not None:
            self._stream.begin(self._shards, self._timer)
        if self._lowered:
            for tensor in self.prepared.tensors:
                is_weight(tensor)

    def measure(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """The :attr:`errors` of the folds of these weights, with nothing prepared."""
        if not self.plan.manifest.lora:
            return {}
        measured = Measured()
        with torch.no_grad(), self._weights(tensors) as weights:
            self._functions["prepare"]["measure"](weights, measured)
        return self._worst(measured)

    @property
    def errors(self) -> dict[str, float]:
        """The largest relative error that a fold made at each adapted place of the layers.

        Of the latest prepare, where that measures; all of them 0 where not.
        """
        return self._worst(self._measured)

    def _worst(self, measured: Measured) -> dict[str, float]:
        sites = [str(site) for site in self.plan.manifest.lora]
        worst: dict[str, float] = {}
        for site, error in zip(sites, measured.floats(len(sites)), strict=True):
            worst[site] = max(worst.get(site, 0.0), error)
        return worst

    def session(
        self, *, batch: int, capacity: int, timer: Timer | None = None, recorded: bool = True
    ) -> PlanSession:
        """Open a session of ``batch`` rows with ``capacity`` columns reserved.

        Args:
            timer: In place of the runner's own, for a session whose work is not the user's.
            recorded: Whether decode steps may come from recordings.

        Raises:
            EngineClosedError: where nothing is prepared.
            EngineBusyError: where another session is open.
        """
        if not self.prepared.tensors:
            raise EngineClosedError("nothing is prepared; generate through the engine")
        if self._open is not None:
            raise EngineBusyError(BUSY)
        steps = self.recorded if recorded else None
        session = PlanSession(
            self.workspace,
            self._graph("prefill"),
            self._graph("decode"),
            self.prepared.tensors,
            batch=batch,
            capacity=self.capacity(capacity),
            device=self.device,
            limit=self._limit,
            group=self._group,
            timer=timer or self._timer,
            on_close=self._close,
            recorded=steps,
        )
        if steps is not None:
            steps.begin(self.prepared.tensors, batch, padded=self.rows_apart)
        self._open = session
        return session

    def capacity(self, wanted: int) -> int:
        """The columns to reserve for a session that wants this many."""
        # A row that is never full keeps its stride apart from its length: one graph for both.
        return max(wanted, self._presize) + self._lowered

    def run(self, stage: str, *inputs: Any) -> Tensor:
        """One call of ``"prefill"`` or ``"decode"`` on the workspace as it stands.

        Args:
            stage: Which.
            inputs: What its source takes before ``prepared``, in order.

        Returns:
            [B, keep, V] in the model's logits dtype.
        """
        memory = (self.prepared.tensors, self.workspace.keys, self.workspace.values)
        embeds = (None,) if stage == "prefill" else ()
        return self._graph(stage)(*inputs, *memory, *embeds, *self._group)

    def _graph(self, stage: str) -> Graph:
        """A function of the plan as sessions call it."""
        graph: Graph = self._functions[stage][stage]
        if not self._shards:
            return graph
        shards, stream = self._shards, self._stream
        if stream is None:
            return lambda *given: graph(*given, shards)
        return lambda *given: stream.run(graph, *given, shards)

    @property
    def streamed_bytes(self) -> int:
        """The most that graphs gather beside what is prepared: two layers."""
        sizes: dict[int, int] = {}
        for weight in self.plan.manifest.streamed:
            size = math.prod(weight.shape) * getattr(torch, weight.dtype).itemsize
            sizes[weight.layer] = sizes.get(weight.layer, 0) + size
        return 2 * max(sizes.values(), default=0)

    @property
    def recorded_bytes(self) -> int:
        """Bytes that recordings of decode steps hold."""
        return 0 if self.recorded is None else self.recorded.nbytes

    def _close(self) -> None:
        self._open = None

    def release(self) -> None:
        """Give the workspace's and the prepared tensors' memory back."""
        self._open, self._shards = None, []
        if self.recorded is not None:
            self.recorded.release()
        self.workspace.release()
        self.prepared.release()
