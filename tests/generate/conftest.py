"""Every test of this folder runs on each runtime below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from generate import same_as_hf
from generate.hf_runner import HFRunner

from hybrid_fx.config import HybridConfig
from hybrid_fx.engine.graphs import ModelGraphs
from hybrid_fx.engine.stats import Stats
from hybrid_fx.engine.versions import WeightTracker


def plan_runner(model: Any) -> Any:
    """The real runtime: the graphs of a plan, ready before any test counts or patches."""
    tracker, stats = WeightTracker(model), Stats()
    graphs = ModelGraphs(model, HybridConfig(), stats, tracker)
    runner = graphs.ready()
    tracker.close()
    if runner is None:
        assert "inv_freq" in graphs.failure, graphs.failure
        pytest.skip("long rope keeps its frequencies outside of the buffers: no plan to run")
    return runner


RUNTIMES: dict[str, Callable[[Any], Any]] = {"hf": HFRunner, "plan": plan_runner}


@pytest.fixture(autouse=True, params=RUNTIMES)
def _runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_as_hf, "make_runtime", RUNTIMES[request.param])
