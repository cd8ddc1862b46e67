"""What a deeper model costs: more calls of the same functions, and nothing else."""

from __future__ import annotations

import pytest
from call_counts import calls_of
from tiny_models import prompt, tiny

import hybrid_fx
from hybrid_fx.capture import capture
from hybrid_fx.engine import plans
from hybrid_fx.plan.build import build_plan, normalize

DEPTHS = (2, 3, 4)


@pytest.fixture(scope="module")
def sources():
    """Depth to the generated sources of a Llama of that depth."""
    return {
        depth: hybrid_fx.hybridize(tiny("llama", layers=depth)).explain().sources
        for depth in DEPTHS
    }


def test_every_depth_has_one_layer_function_a_stage(sources):
    for depth, stages in sources.items():
        for stage, source in stages.items():
            assert source.count("def ") == 2, (depth, stage)
        assert stages["decode"].count("= decoder_layer(") == depth
        layer = stages["decode"].split("\n\n")[0]
        assert layer == sources[DEPTHS[0]]["decode"].split("\n\n")[0]


def test_a_source_grows_by_the_calls_of_its_layers(sources):
    for stage in ("prepare", "prefill", "decode"):
        first, second, third = (sources[depth][stage].count("(") for depth in DEPTHS)
        assert third - second == second - first


def test_a_model_that_did_not_change_costs_no_key_and_no_prepare(monkeypatch):
    engine = hybrid_fx.hybridize(tiny("llama"))
    call = {**prompt((3,)), "max_new_tokens": 2, "do_sample": False}
    engine.generate(**call)
    counted = dict(engine.stats.counters)

    def refuse(*_, **__):
        raise AssertionError("nothing changed")

    monkeypatch.setattr(plans.StructureKey, "of", refuse)
    monkeypatch.setattr(engine._graphs.runner, "prepare", refuse)
    for _ in range(3):
        engine.eval()
        engine.generate(**call)
        engine.train()
    counted["generate_calls"] += 3
    assert dict(engine.stats.counters) == counted


def calls_of_planning(depth: int) -> int:
    """Calls that it takes to build a plan from the graph of a Llama of that depth."""
    graph = normalize(capture(tiny("llama", layers=depth)).graph)
    return calls_of(lambda: build_plan(graph, model="llama", vocab_size=64))


@pytest.mark.deep
def test_planning_grows_with_depth_and_not_with_its_square() -> None:
    calls_of_planning(1)  # what is done once in a process
    four, eight, sixteen = (calls_of_planning(depth) for depth in (4, 8, 16))
    assert sixteen - eight < 2.5 * (eight - four)
