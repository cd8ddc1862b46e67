"""From a live model to a prepared runner: capture, plan cache, LoRA choice, prepare, probe.

Asked before every generate; does nothing where neither structure nor weights changed.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..cache.disk import default_directory
from ..cache.key import StructureKey
from ..cache.plan_cache import PlanCache
from ..cache.stamp import structure_stamp
from ..capture import assumptions, capture
from ..config import HybridConfig
from ..errors import StrictError
from ..generate import causal_lm, position_limit
from ..passes.contract import Context
from ..passes.driver import PassRecord, run_passes
from ..passes.operators import OPERATORS
from ..passes.pipeline import NORMALIZE
from ..plan.build import build_plan
from ..plan.choice import optional_passes, policies
from ..plan.plan import Plan
from ..runtime import PlanRunner
from ..runtime.lowering import by_inductor
from ..runtime.probe import Verdict, probe
from .proof import by_graph, by_module, said, telling
from .stats import Stats
from .versions import WeightTracker

logger = logging.getLogger("hybrid_fx")

#: Fold an adapter only where rounding takes less than this share of it (law of ``lora="auto"``).
FOLD_LIMIT = 0.05

#: Says nothing about a plan: what ran out may be there the next time.
_NO_MEMORY = (MemoryError, torch.OutOfMemoryError)


class ModelGraphs:
    """The plan and the prepared tensors of one model, kept in step with it.

    Attributes:
        runner: Of the plan in use; ``None`` before the first use and where capture failed.
        failure: Why the model runs as the original module, or "".
        errors: Measured relative error of folding, by adapted place; empty where not measured.
    """

    def __init__(
        self, model: nn.Module, config: HybridConfig, stats: Stats, tracker: WeightTracker
    ) -> None:
        self._model = model
        self._config = config
        self._stats = stats
        self._tracker = tracker
        self._passes, self._policies = optional_passes(config), policies(config)
        directory = None
        if config.disk_cache:
            directory = Path(config.cache_dir) if config.cache_dir else default_directory()
        self._cache = PlanCache(directory, operator_names=OPERATORS.keys())
        self.runner: PlanRunner | None = None
        self.failure = ""
        self.errors: dict[str, float] = {}
        self._stamp: Any = None
        self._digest = ""
        self._unmatched = ""
        self._stored = self._distrusted = False
        self._built: set[str] = set()
        self._folding: PlanRunner | None = None
        self._canonical: fx.Graph | None = None
        self._normalized: tuple[PassRecord, ...] = ()
        self._prepared_version: int | None = None
        self._proven: PlanRunner | None = None
        self._side: frozenset[str] = frozenset()

    def ready(self) -> PlanRunner | None:
        """A runner whose prepared tensors belong to the weights as they are now.

        Returns:
            ``None`` where the model cannot be captured; :attr:`failure` says why.

        Raises:
            StrictError: under ``strict=True``, where a layer or the model is not rewritten.
        """
        # A caller's autocast must enter neither the graphs nor what is prepared from the weights.
        with torch.no_grad(), torch.autocast(self._device().type, enabled=False):
            self._follow()
        if reason := self.failure or self._unmatched:
            self._refuse_if_strict(reason)
        return self.runner

    def _follow(self) -> None:
        """Bring plan and prepared tensors up to the model as it stands."""
        stamp = structure_stamp(self._model)
        if stamp != self._stamp:
            self._stamp = None  # until all of it went well
            self._read_structure()
            self._stamp = stamp
        version = self._tracker.refresh()
        if not self.failure and version != self._prepared_version:
            self._prepare()
            self._prepared_version = version

    def _refuse_if_strict(self, reason: str) -> None:
        if self._config.strict:
            raise StrictError(f"{reason}; set strict=False to run that part as it is")

    def _read_structure(self) -> None:
        """Find the plan of the model as it stands now."""
        digest = StructureKey.of(self._model, self._config).digest()
        self._prepared_version = None
        moved = self.runner is not None and self.runner.device != self._device()
        if digest == self._digest and not self.failure and not moved:
            return
        self._digest, self.failure, self._unmatched = "", "", ""
        self._canonical, self._distrusted, self._built = None, False, set()
        self._load(digest)
        self._digest = digest

    def _load(self, digest: str) -> None:
        """A runner for the plan of ``digest``, nothing prepared yet."""
        self._drop()
        try:
            plan = self._plan(digest, frozenset())
            self._folding = self.runner = self._make_runner(plan)
        except _NO_MEMORY:
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

    def _plan(self, digest: str, side: frozenset[str]) -> Plan:
        """From memory, from the disk, or built from a capture."""
        name = digest
        if side:
            name = hashlib.sha256(f"{digest} {sorted(side)}".encode()).hexdigest()
        assumed = assumptions()
        hits = self._cache.hits_memory
        plan = None if self._distrusted and name not in self._built else self._cache.get(name)
        if plan is not None and not plan.manifest.broken_guards(assumed):
            memory = self._cache.hits_memory > hits
            self._stats.count("cache_hits_memory" if memory else "cache_hits_disk")
            self._stored = name not in self._built
            return plan
        canonical = self._canonical_graph()
        plan = build_plan(
            canonical,
            model=type(causal_lm(self._model)).__name__,
            vocab_size=self._vocabulary(),
            guards=assumed,
            side=side,
            fusions=self._config.fusions,
            passes=self._passes,
            policies=self._policies,
            before=self._normalized,
        )
        self._cache.put(name, plan)
        self._stored = False
        self._built.add(name)
        return plan

    def _canonical_graph(self) -> fx.Graph:
        if self._canonical is None:
            captured = capture(self._model)
            self._stats.count("captures")
            self._normalized = run_passes(captured.graph, NORMALIZE, Context())
            self._canonical = captured.graph
        return self._canonical

    def _vocabulary(self) -> int:
        table = causal_lm(self._model).get_input_embeddings()
        return int(table.weight.shape[0])

    def _make_runner(self, plan: Plan) -> PlanRunner:
        return PlanRunner(
            plan,
            device=self._device(),
            lower=by_inductor if self._config.graph == "inductor" else None,
            limit=self._limit(),
            max_out_tokens=self._config.max_out_tokens,
            timer=self._stats.timer,
        )

    def _device(self) -> torch.device:
        return next(iter(self._model.parameters())).device

    def _limit(self) -> int | None:
        return position_limit(causal_lm(self._model).config)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by qualified name, as they are now."""
        model = self._model
        found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        found |= dict(model.named_buffers(remove_duplicate=False))
        return found

    def _prepare(self) -> None:
        """Run the prepare graph on the weights as they are; choose where LoRA folds first."""
        with self._stats.timer("prepare"):
            tensors = self.tensors()
            wrong = self._prepare_proven(tensors)
            if wrong is not None and self._stored:
                warnings.warn(
                    f"hybrid_fx: the stored plan of {type(self._model).__name__} is not used "
                    f"({said(wrong)}); the model is captured again and the file replaced",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._distrusted = True
                self._load(self._digest)
                wrong = None if self.failure else self._prepare_proven(tensors)
            if wrong is not None:
                self._fail("the rewritten graphs do not reproduce it", wrong)

    def _prepare_proven(self, tensors: dict[str, Tensor]) -> object:
        """Prepare; at a plan's first use, prove it before. Returns what is wrong with it."""
        try:
            self._choose_side(tensors)
            assert self.runner is not None
            if self._proven is not self.runner:
                verdict = self._compare(tensors)
                if verdict.difference:
                    return verdict.difference
                if verdict.settled:
                    self._proven = self.runner
        except _NO_MEMORY:
            raise
        except Exception as error:
            return error
        self.runner.prepare(tensors)
        self._stats.count("prepares")
        return None

    def _choose_side(self, tensors: dict[str, Tensor]) -> None:
        assert self._folding is not None
        assert self.runner is not None
        if self._config.lora != "auto" or not self._folding.plan.manifest.lora:
            return
        errors = self._folding.measure(tensors)
        side = frozenset(site for site, error in errors.items() if error >= FOLD_LIMIT)
        if side != self._side:
            old = self.runner
            new = self._make_runner(self._plan(self._digest, side)) if side else self._folding
            old.release()
            self.runner, self._side = new, side
        self.errors = errors

    def _compare(self, tensors: dict[str, Tensor]) -> Verdict:
        """Hold the plan in use against the forward it came from."""
        assert self.runner is not None
        changed = telling(tensors, [weight.name for weight in self.runner.plan.manifest.weights])
        weights = tensors | changed
        self.runner.prepare(weights)
        try:
            return probe(
                self.runner,
                by_module(self._model, changed)
                if self._canonical is None
                else by_graph(self._canonical, weights),
                self._limit(),
            )
        finally:
            self.runner.workspace.release()

    @property
    def prepare_peak_bytes(self) -> int:
        """An upper bound of the bytes a prepare holds at once, the choice of LoRA included."""
        if self.runner is None or self._folding is None:
            return 0
        measuring = self.runner.prepared.nbytes + self._folding.measure_peak_bytes
        return max(self.runner.prepare_peak_bytes, measuring if self.errors else 0)

    def release(self) -> None:
        """Give all inference memory back; the next use prepares again."""
        for runner in (self.runner, self._folding):
            if runner is not None:
                runner.release()
        self._prepared_version = None

    def _drop(self) -> None:
        self.release()
        self.runner = self._folding = self._proven = None
        self._side, self.errors = frozenset(), {}
