"""From a live model to a prepared runner: capture, plan cache, LoRA choice, prepare, probe.

Asked before every generate; does nothing where neither structure nor weights changed.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..cache.disk import default_directory
from ..cache.key import StructureKey
from ..cache.plan_cache import PlanCache
from ..cache.stamp import structure_stamp
from ..capture import capture
from ..config import HybridConfig
from ..errors import CaptureError, StrictError
from ..generate import causal_lm, inference_mode_of, position_limit
from ..passes.operators import OPERATORS
from ..passes.spec import IllegalGraphError
from ..plan.build import build_plan, normalize
from ..plan.plan import Plan
from ..runtime import PlanRunner
from ..runtime.probe import probe
from .stats import Stats
from .versions import WeightTracker

logger = logging.getLogger("hybrid_fx")

#: Fold an adapter only where rounding takes less than this share of it (law of ``lora="auto"``).
FOLD_LIMIT = 0.05


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
        directory = None
        if config.disk_cache:
            directory = Path(config.cache_dir) if config.cache_dir else default_directory()
        self._cache = PlanCache(directory, operator_names=OPERATORS.keys())
        self.runner: PlanRunner | None = None
        self.failure = ""
        self.errors: dict[str, float] = {}
        self._stamp: Any = None
        self._digest = ""
        self._folding: PlanRunner | None = None
        self._canonical: fx.Graph | None = None
        self._prepared_version: int | None = None
        self._probed: PlanRunner | None = None
        self._side: frozenset[str] = frozenset()

    def ready(self) -> PlanRunner | None:
        """A runner whose prepared tensors belong to the weights as they are now.

        Returns:
            ``None`` where the model cannot be captured; :attr:`failure` says why.

        Raises:
            StrictError: under ``strict=True``, where a layer or the model is not rewritten.
        """
        stamp = structure_stamp(self._model)
        if stamp != self._stamp:
            self._read_structure()
            self._stamp = stamp
        version = self._tracker.refresh()
        if self.failure:
            self._refuse_if_strict(self.failure)
            return None
        if version != self._prepared_version:
            self._prepare()
            self._prepared_version = version
        if self.failure:
            self._refuse_if_strict(self.failure)
            return None
        return self.runner

    def _refuse_if_strict(self, reason: str) -> None:
        if self._config.strict:
            raise StrictError(f"{reason}; set strict=False to run that part as it is")

    def _read_structure(self) -> None:
        """Find the plan of the model as it stands now."""
        digest = StructureKey.of(self._model, self._config).digest()
        self._prepared_version = None
        if digest == self._digest and not self.failure:
            return
        self._digest, self.failure, self.errors = digest, "", {}
        self._canonical, self._side = None, frozenset()
        self._drop()
        try:
            plan = self._plan(digest, frozenset())
        except (CaptureError, IllegalGraphError) as error:
            self._fail(str(error))
            return
        self._folding = self.runner = self._make_runner(plan)
        unmatched = [row["path"] for row in plan.manifest.layers if not row["policy"]]  # type: ignore[index,call-overload]
        if unmatched or not plan.manifest.layers:
            which = ", ".join(map(str, unmatched)) or "the model: no decoder layer was found"
            self._refuse_if_strict(f"no policy fits {which}")

    def _fail(self, reason: str) -> None:
        self._drop()
        self.failure = f"not captured: {reason}"
        logger.warning("%s runs as transformers' module: %s", type(self._model).__name__, reason)

    def _plan(self, digest: str, side: frozenset[str]) -> Plan:
        """From memory, from the disk, or built from a capture."""
        name = digest
        if side:
            name = hashlib.sha256(f"{digest} {sorted(side)}".encode()).hexdigest()
        hits = self._cache.hits_memory
        plan = self._cache.get(name)
        if plan is not None:
            memory = self._cache.hits_memory > hits
            self._stats.count("cache_hits_memory" if memory else "cache_hits_disk")
            return plan
        disabled = self._config.disable_passes
        if self._config.lora == "side":
            disabled += ("fold_lora",)
        plan = build_plan(
            self._canonical_graph(),
            model=type(causal_lm(self._model)).__name__,
            vocab_size=self._vocabulary(),
            side=side,
            disable_passes=disabled,
        )
        self._cache.put(name, plan)
        return plan

    def _canonical_graph(self) -> fx.Graph:
        if self._canonical is None:
            captured = capture(self._model)
            self._stats.count("captures")
            self._canonical = normalize(captured.graph)
        return self._canonical

    def _vocabulary(self) -> int:
        table = causal_lm(self._model).get_input_embeddings()
        return int(table.weight.shape[0])

    def _make_runner(self, plan: Plan) -> PlanRunner:
        lower = None
        if self._config.graph == "inductor":
            lower = torch.compile
        return PlanRunner(
            plan,
            device=next(iter(self._model.parameters())).device,
            lower=lower,
            limit=self._limit(),
            max_out_tokens=self._config.max_out_tokens,
            timer=self._stats.timer,
        )

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
        assert self.runner is not None and self._folding is not None
        with self._stats.timer("prepare"):
            tensors = self.tensors()
            self._choose_side(tensors)
            self.runner.prepare(tensors)
            self._stats.count("prepares")
            if self._probed is not self.runner:
                self._probed = self.runner
                self._probe(tensors)

    def _choose_side(self, tensors: dict[str, Tensor]) -> None:
        assert self._folding is not None and self.runner is not None
        if self._config.lora != "auto" or not self._folding.plan.manifest.lora:
            return
        self.errors = self._folding.measure(tensors)
        side = frozenset(site for site, error in self.errors.items() if error >= FOLD_LIMIT)
        if side != self._side:
            self._side = side
            old = self.runner
            plan = self._plan(self._digest, side)
            self.runner = self._folding if not side else self._make_runner(plan)
            old.release()

    def _probe(self, tensors: dict[str, Tensor]) -> None:
        """Once for each runner: its logits against those of the forward it came from."""
        assert self.runner is not None
        canonical = self._canonical
        if canonical is not None:
            whole = fx.GraphModule({}, canonical)
            holders = [n for n in canonical.nodes if n.op == "placeholder"]

            def reference(ids: Tensor, positions: Tensor) -> Tensor:
                given = {"input_ids": ids, "position_ids": positions}
                out: Tensor = whole(
                    *(
                        given[n.meta["input"]] if "input" in n.meta else tensors[n.meta["weight"]]
                        for n in holders
                    )
                )
                return out
        else:

            def reference(ids: Tensor, positions: Tensor) -> Tensor:
                with inference_mode_of(self._model):
                    out: Tensor = self._model(
                        input_ids=ids, position_ids=positions, use_cache=False
                    ).logits
                return out

        difference = probe(self.runner, reference, self._limit())
        self.runner.workspace.release()
        if difference is not None:
            self._fail(f"the rewritten graphs do not reproduce it: {difference}")

    def release(self) -> None:
        """Give all inference memory back; the next use prepares again."""
        for runner in (self.runner, self._folding):
            if runner is not None:
                runner.release()
        self._prepared_version = None

    def _drop(self) -> None:
        self.release()
        self.runner = self._folding = None
