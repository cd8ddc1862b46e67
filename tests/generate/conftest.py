"""Every test of this folder runs on each runtime below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from generate import same_as_hf
from generate.hf_runner import HFRunner

from hybrid_fx.config import HybridConfig
from hybrid_fx.engine.graphs import ModelGraphs
from hybrid_fx.engine.source import Source
from hybrid_fx.engine.stats import Stats
from hybrid_fx.engine.versions import WeightTracker

#: What the failure of a capture says, and what is missing.
NO_PLAN = {
    "inv_freq": "long rope keeps its frequencies outside of the buffers",
    "sym_size_int": "an activated LoRA looks for tokens in the prompt",
}


def plan_runner(model: Any) -> Any:
    """The real runtime: the graphs of a plan, ready before any test counts or patches."""
    tracker, stats = WeightTracker(model), Stats()
    graphs = ModelGraphs(Source(model), HybridConfig(), stats, tracker)
    runner = graphs.ready()
    tracker.close()
    if runner is None:
        why = next((why for said, why in NO_PLAN.items() if said in graphs.failure), None)
        assert why is not None, graphs.failure
        pytest.skip(f"no plan to run: {why}")
    return runner


RUNTIMES: dict[str, Callable[[Any], Any]] = {"hf": HFRunner, "plan": plan_runner}


@pytest.fixture(autouse=True, params=RUNTIMES)
def _runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_as_hf, "make_runtime", RUNTIMES[request.param])
