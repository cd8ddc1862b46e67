"""The plan of a model's structure: from memory, from the disk, or built from a capture."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import fx

from ..cache.disk import default_directory
from ..cache.key import StructureKey
from ..cache.plan_cache import PlanCache
from ..capture import Captured, assumptions, capture
from ..config import HybridConfig
from ..generate import causal_lm
from ..passes.contract import Context
from ..passes.driver import PassRecord, run_passes
from ..passes.operators import OPERATORS
from ..passes.pipeline import NORMALIZE
from ..plan.build import build_plan
from ..plan.choice import optional_passes, policies
from ..plan.plan import Plan
from .attempt import capture_once
from .source import Source
from .stats import Stats


def cache_directory(config: HybridConfig) -> Path | None:
    """Where a config keeps things on the disk; ``None``: nowhere."""
    if not config.disk_cache:
        return None
    return Path(config.cache_dir) if config.cache_dir else default_directory()


def open_cache(config: HybridConfig) -> PlanCache:
    """The plan cache that a config asks for."""
    return PlanCache(cache_directory(config), operator_names=OPERATORS.keys())


def find_plan(cache: PlanCache, name: str, stats: Stats) -> Plan | None:
    """A plan from memory or from the disk, whose assumptions hold; the hit is counted."""
    hits = cache.hits_memory
    plan = cache.get(name)
    if plan is None or plan.manifest.broken_guards(assumptions()):
        return None
    memory = cache.hits_memory > hits
    stats.count("cache_hits_memory" if memory else "cache_hits_disk")
    return plan


class Plans:
    """Finds the plans of one model, of one structure at a time.

    Attributes:
        digest: Of the structure's key; "" before the first :meth:`select`.
        canonical: The captured graph, where it was needed.
        stored: Whether the latest plan was made by another process.
    """

    def __init__(self, source: Source, config: HybridConfig, stats: Stats) -> None:
        self._source = source
        self._config = config
        self._stats = stats
        self._streams = source.stream is not None
        self._passes, self._policies = (
            optional_passes(config, stream=self._streams),
            policies(config),
        )
        self._cache = open_cache(config)
        self.digest = ""
        self.canonical: fx.Graph | None = None
        self.stored = False
        self._normalized: tuple[PassRecord, ...] = ()
        self._distrusted = False
        self._built: set[str] = set()

    def read(self) -> str:
        """The digest of the structure as it stands."""
        return StructureKey.of(self._source.structure(), self._config).digest()

    def select(self, digest: str) -> None:
        """Plans are of the structure ``digest`` from now on."""
        self.digest = digest
        self.canonical, self._distrusted, self._built = None, False, set()

    def distrust(self) -> None:
        """Use no plan any more that another process made."""
        self._distrusted = True

    def plan(self, side: frozenset[str] = frozenset()) -> Plan:
        """The plan in which the adapted modules ``side`` keep their LoRA as a branch."""
        name, shard = self.digest, self._source.shard
        if side or shard[1] > 1 or self._streams:
            which = (f" of {shard}" if shard[1] > 1 else "") + " streamed" * self._streams
            name = hashlib.sha256(f"{name} {sorted(side)}{which}".encode()).hexdigest()
        distrusted = self._distrusted and name not in self._built
        plan = None if distrusted else find_plan(self._cache, name, self._stats)
        if plan is not None:
            self.stored = name not in self._built
            return plan
        canonical = self.captured()
        plan = build_plan(
            canonical,
            model=type(causal_lm(self._source.model)).__name__,
            vocab_size=self._vocabulary(),
            guards=assumptions(),
            side=side,
            fusions=self._config.fusions,
            passes=self._passes,
            policies=self._policies,
            before=self._normalized,
            shard=shard,
            stream=self._streams,
        )
        self._cache.put(name, plan)
        self.stored = False
        self._built.add(name)
        return plan

    def captured(self) -> fx.Graph:
        """The canonical graph of the structure, captured where that was not needed before."""
        if self.canonical is None:
            captured = capture_once(self._cache, self.digest, self._capture)
            self._stats.count("captures")
            self._normalized = run_passes(captured.graph, NORMALIZE, Context())
            self.canonical = captured.graph
        return self.canonical

    def _capture(self) -> Captured:
        # Ranks that generate together come to one end; one that gave up alone would not.
        timeout = None if self._source.collective else self._config.capture_timeout
        return capture(self._source.structure(), timeout=timeout)

    def _vocabulary(self) -> int:
        table = causal_lm(self._source.model).get_input_embeddings()
        return int(self._source.view.shape(table.weight)[0])
