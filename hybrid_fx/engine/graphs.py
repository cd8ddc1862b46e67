"""From a live model to a prepared runner: capture, plan cache, LoRA choice, prepare, probe.

Asked before every generate; does nothing where neither structure nor weights changed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..compat.placement import device_of, unreadable
from ..config import HybridConfig
from ..errors import CaptureError, HybridError, StrictError
from ..generate import Runner
from ..runtime import PlanRunner
from ..runtime.probe import Verdict
from ..runtime.shared_rows import SharedRows
from .plans import Plans
from .proof import said
from .prover import Prover
from .runners import limit_of
from .sides import Sides
from .source import Ask, Source
from .stats import Stats
from .together import NO_MEMORY, Together, fault_of
from .versions import WeightTracker

logger = logging.getLogger("hybrid_fx")


class ModelGraphs:
    """The plan and the prepared tensors of one model, kept in step with it.

    Attributes:
        weights: All of the weights, in a call in which some rank runs the module itself.
        agreed: Whether all ranks have agreed on what the call in progress takes.
        failure: Why the model runs as the original module, or "".
        rows: Where stacked weights lie in one buffer; ``None`` where that was not asked for, or
            the model's memory is not ours to lay out.
    """

    def __init__(
        self, source: Source, config: HybridConfig, stats: Stats, tracker: WeightTracker
    ) -> None:
        self._source = source
        self._model = source.model
        self._config = config
        self._stats = stats
        self._tracker = tracker
        self._plans = Plans(source, config, stats)
        self._team = Together(source)
        own = config.share_storage and source.gather is None and not source.joint
        self.rows = SharedRows() if own else None
        self._sides = Sides(self._plans, source, config, stats, self.rows)
        self.failure = ""
        self.weights: Mapping[str, Tensor] = {}
        self.agreed = False
        self._stamp: Any = None
        self._digest = ""
        self._unmatched = ""
        self._prepared_version: int | None = None
        self._proven: PlanRunner | None = None

    @property
    def runner(self) -> PlanRunner | None:
        """Of the plan in use; ``None`` before the first use and where capture failed."""
        return self._sides.runner

    @property
    def errors(self) -> dict[str, float]:
        """Measured relative error of folding, by adapted place; empty where not measured."""
        return self._sides.errors

    def begin(self) -> None:
        """A call begins: where sharded, all ranks will agree once on what it takes."""
        self.agreed = False
        self._source.begin()

    def finish(self) -> None:
        """The call has ended well here; where sharded, on all ranks.

        Raises:
            RankError: where it did not on another one.
        """
        self._source.finish()

    def abandon(self) -> None:
        """The call ends in an error; tell the ranks that wait for this one."""
        self._source.abandon()

    def end(self) -> None:
        """The call has ended; the module no longer runs."""
        self.weights = {}

    def ready(self, *, whole: bool = False) -> Runner | None:
        """A runner whose prepared tensors belong to the weights as they are now.

        Args:
            whole: This call runs the module itself. :attr:`weights` are all of them then, until
                :meth:`end`.

        Returns:
            ``None`` where the model cannot be captured; :attr:`failure` says why.

        Raises:
            StrictError: under ``strict=True``, where a layer or the model is not rewritten.
            RankError: where another rank raised, or has another model.
            InputError: where ranks that generate together were asked for different things.
        """
        # A caller's autocast must enter neither the graphs nor what is prepared from the weights.
        with torch.no_grad(), torch.autocast(device_of(self._model).type, enabled=False):
            self._follow(whole)
        if reason := self.failure or self._unmatched:
            self._refuse_if_strict(reason)
        return self.runner and self._source.joined(self.runner, self._stats.timer)

    def read(self) -> None:
        """Find the plan of the model as it stands, in this process alone; prepare nothing."""
        try:
            stamp = self._source.stamp()
            if stamp == self._stamp:
                return
            self._stamp = None  # until all of it went well
            if (fault := unreadable(self._model)) is not None:
                raise CaptureError(fault)
            digest = self._plans.read()
        except NO_MEMORY:
            raise
        except Exception as error:  # a model that cannot be read generates all the same
            self._stamp, self._digest, self._unmatched = None, "", ""
            if said(error) not in self.failure:
                self._fail("not captured", error)
            return
        self._read_structure(digest)
        self._stamp = stamp

    def _follow(self, whole: bool) -> None:
        """Bring plan and prepared tensors up to the model as it stands."""
        if whole and self.agreed:
            raise HybridError(
                "this call left the rewritten graphs after all ranks had agreed that it runs on "
                "them; call it without the option that does, or under ZeRO stage 2"
            )
        self.read()
        version = self._tracker.refresh()
        stale = not self.failure and version != self._prepared_version
        wanted = Ask(
            prepare=stale,
            prove=stale and self._proven is not self.runner,
            whole=whole or bool(self.failure),
        )
        self.agreed = True
        agreed = self._source.agree(wanted, self._contract())
        if not self.failure and (agreed.prepare or agreed.prove):
            self._prepare(agreed.prove)
            self._prepared_version = version
        if self._source.sharded and (agreed.whole or self.failure):
            self.weights = self._source.whole(self._stats.timer)
        self._source.prepared()

    def _contract(self) -> str:
        """What decides which weights are gathered and in which order, and what is computed."""
        if self._sides.folding is None:
            return ""
        plan = self._sides.folding.plan
        if self._source.joint:  # each rank has sources of its own
            return self._digest + repr(plan.manifest.weights)
        return plan.sources["prepare"] + repr((plan.manifest.weights, plan.manifest.streamed))

    def _refuse_if_strict(self, reason: str) -> None:
        if self._config.strict:
            raise StrictError(f"{reason}; set strict=False to run that part as it is")

    def _read_structure(self, digest: str) -> None:
        """Find the plan of the model as it stands now."""
        self._prepared_version = None
        moved = self.runner is not None and self.runner.device != device_of(self._model)
        if digest == self._digest and not self.failure and not moved:
            return
        self._digest, self.failure, self._unmatched = "", "", ""
        self._plans.select(digest)
        self._load()
        self._digest = digest

    def _load(self) -> None:
        """A runner for the plan that folds, nothing prepared yet."""
        self._drop()
        if self.rows is not None:
            self.rows.begin()
        try:
            plan = self._sides.load()
        except NO_MEMORY:
            raise
        except Exception as error:  # a model that does not compile generates all the same
            self._fail("not captured", error)
            return
        rows: tuple[Any, ...] = plan.manifest.layers
        unmatched = [row["path"] for row in rows if not row["policy"]]
        if unmatched or not rows:
            which = ", ".join(map(str, unmatched)) or "the model: no decoder layer was found"
            self._unmatched = f"no policy fits {which}"

    def _fail(self, what: str, reason: object) -> None:
        self._drop()
        self.failure = f"{what}: {said(reason)}"
        logger.warning(
            "%s runs as transformers' module: %s", type(self._model).__name__, self.failure
        )

    @property
    def shard(self) -> tuple[int, int]:
        """Which rank of how many compute the model together."""
        return self._source.shard

    def tensors(self) -> dict[str, Tensor]:
        """What holds each parameter and buffer in this process, by qualified name."""
        return self._source.tensors()

    def _prepare(self, prove: bool) -> None:
        """Run the prepare graph on the weights as they are; choose where LoRA folds first."""
        with self._stats.timer("prepare"):
            whole = prove and not self._source.in_part
            tensors = self._source.whole(self._stats.timer) if whole else self.tensors()
            wrong = self._prepare_proven(tensors, prove)
            (stored,) = self._source.any(wrong is not None and self._plans.stored)
            if wrong is not None and stored:
                warnings.warn(
                    f"hybrid_fx: the stored plan of {type(self._model).__name__} is not used "
                    f"({said(wrong)}); the model is captured again and the file replaced",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._plans.distrust()
                self._load()
                wrong = self._team.shared(self.failure or None)
                wrong = wrong if wrong is not None else self._prepare_proven(tensors, prove)
            if wrong is not None and not self.failure:
                self._fail("the rewritten graphs do not reproduce it", wrong)

    def _prepare_proven(self, tensors: dict[str, Tensor], prove: bool) -> object:
        """Prepare; at a plan's first use, prove it before. Returns what is wrong with it."""
        # Where all adapters were folded the last time, a prepare measures what it folds anew.
        folds = self._sides.all_folded and not prove
        wrong = None if folds else self._team.shared(fault_of(lambda: self._sides.choose(tensors)))
        needed = self._proven is not self.runner or (prove and self._source.joint)
        needed = prove if self._source.stream is not None else needed  # on all ranks, or on none
        if wrong is None and needed:
            # A choice of sides that was not made before is proven on all ranks, or on none.
            if not prove and not self._source.in_part:
                tensors = self._source.whole(self._stats.timer)
            wrong = self._prove(tensors)
        if wrong is None:
            assert self.runner is not None
            rows = self.rows
            with rows.laying_out(tensors, self._tracker.follow) if rows else nullcontext():
                self.runner.prepare(tensors)
            self._stats.count("prepares")
            if folds and not self._sides.still_fold():
                return self._prepare_proven(tensors, prove)
        return wrong

    def _prove(self, tensors: dict[str, Tensor]) -> object:
        """Hold the plan in use against the forward it came from. Returns what is wrong with it."""
        found: list[Verdict] = []
        limit = limit_of(self._model)
        runner = self.runner
        assert runner is not None
        prover = Prover(self._source, self._plans, self._team, self._stats.timer)
        wrong = fault_of(lambda: found.append(prover.compare(runner, tensors, limit)))
        if wrong is None and found[0].difference:
            wrong = found[0].difference
        if (wrong := self._team.shared(wrong)) is None and found[0].settled:
            self._proven, runner.rows_apart = runner, found[0].rows_apart
        return wrong

    @property
    def prepare_peak_bytes(self) -> int:
        """An upper bound of the bytes a prepare holds at once, the choice of LoRA included."""
        return self._sides.prepare_peak_bytes

    def release(self) -> None:
        """Give all inference memory back; the next use prepares again."""
        self._sides.release()
        self._source.release()
        self._prepared_version = None

    def close(self) -> None:
        """Give all inference memory back, and the parameters memory of their own."""
        self.release()
        if self.rows is not None:
            self.rows.undo(self.tensors())

    def _drop(self) -> None:
        self.release()
        self._sides.drop()
        self._proven = None
