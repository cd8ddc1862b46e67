"""Passes and policies of the user's in an engine, and what ``explain(passes=True)`` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, fx
from torch.optim import optimizer

import hybrid_fx
from hybrid_fx.engine.switch import engine_of
from hybrid_fx.passes import ANY, Context, Pass, PassResult, Policy, Role
from hybrid_fx.passes.graph import call, calls, path_of
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.passes.pattern import Any as Value

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])


def _tokens(owner: Any) -> Tensor:
    result: Tensor = owner.generate(IDS, max_new_tokens=5, do_sample=False)
    return result


def _times(factor: float) -> Pass:
    """Multiplies the weight of each output projection: right for a factor of one alone."""

    def run(graph: fx.Graph, context: Context) -> PassResult:
        count = 0
        for node in calls(graph, "linear"):
            if path_of(node).endswith("o_proj"):
                with graph.inserting_before(node):
                    new = call(graph, "mul", node.args[1], factor, path=path_of(node))
                node.update_arg(1, new)
                count += 1
        return PassResult(count)

    return Pass("times", run, may_add=frozenset({"mul"}), exact=True)


def _loops(graph: fx.Graph, context: Context) -> PassResult:
    while True:
        graph.call_function(OPERATORS["neg"], (calls(graph, "linear")[0],))


def test_a_pass_of_the_users_runs_and_is_told_and_its_work_is_prepared_once() -> None:
    model = tiny("llama")
    wanted = _tokens(model)
    with hybrid_fx.hybridize(model, passes=(_times(1.0),)) as engine:
        assert torch.equal(_tokens(engine), wanted)
        report = engine.explain(passes=True)
    names = [row.name for row in report.passes]
    row = report.passes[names.index("times")]
    assert (row.stage, row.count, dict(row.added)) == ("layers", 2, {"mul": 2})
    assert names.index("fuse_add_norm") + 1 == names.index("times"), "as late as it fits"
    assert report.sources["prepare"].count("1.0)") == 1, "one function serves both layers"
    assert "1.0)" not in report.sources["decode"]


def test_a_pass_that_changes_what_the_model_computes_is_found_out(tmp_path: Path) -> None:
    model = tiny("llama")
    wanted = _tokens(model)
    with hybrid_fx.hybridize(model, passes=(_times(1.5),), cache_dir=str(tmp_path)) as engine:
        assert torch.equal(_tokens(engine), wanted)
        assert engine.stats.fallbacks
        assert "do not reproduce" in engine.explain().notes[0]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (_loops, "pass mine was stopped"),
        (lambda graph, context: None, "pass mine returned None"),
        (lambda graph, context: 1 / 0, "division by zero"),
    ],
)
def test_a_pass_that_fails_leaves_a_model_that_generates(run: Any, said: str) -> None:
    model = tiny("llama")
    wanted = _tokens(model)
    with hybrid_fx.hybridize(model, passes=(Pass("mine", run, may_add=ANY),)) as engine:
        assert torch.equal(_tokens(engine), wanted)
        assert said in engine.explain().notes[0]


def test_a_pass_that_fails_raises_where_the_engine_is_strict() -> None:
    loops = Pass("mine", _loops)
    with hybrid_fx.hybridize(tiny("llama"), passes=(loops,), strict=True) as engine:
        with pytest.raises(hybrid_fx.StrictError, match="pass mine was stopped"):
            _tokens(engine)


def _nothing(graph: fx.Graph, context: Context) -> PassResult:
    return PassResult(0)


POLICY = Policy(name="mine", roles=(Role(name="norm", pattern=Value()),))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"passes": (Pass("mine", _nothing, requires={"unheard_of"}),)}, "requires 'unheard_of'"),
        ({"passes": (Pass("mine", _nothing, modes={"training"}),)}, "add 'inference' to its"),
        ({"passes": (Pass("mine", _nothing, inputs={"heat"}),)}, "compute them in the graph"),
        ({"passes": (Pass("fuse_mlp", _nothing),)}, "two different passes are called fuse_mlp"),
        ({"passes": (_nothing,)}, "passes holds a function; give a tuple of hybrid_fx.passes.Pass"),
        ({"passes": _nothing}, "passes holds a function"),
        ({"policies": (POLICY, POLICY)}, "two policies are called 'mine'"),
        ({"policies": "llama"}, "policies holds a str"),
        (
            {"disable_passes": ("fuse_mpl",)},
            "no pass is called 'fuse_mpl'; did you mean 'fuse_mlp'",
        ),
        (
            {
                "passes": (Pass("mine", _nothing, requires={"mlp_fused"}),),
                "disable_passes": ("fuse_mlp",),
            },
            "pass mine requires 'mlp_fused'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_touched(
    options: dict[str, Any], said: str
) -> None:
    model = tiny("llama")
    hooks = len(optimizer._global_optimizer_post_hooks)
    with pytest.raises(hybrid_fx.ConfigError, match=said):
        hybrid_fx.hybridize(model, **options)
    assert engine_of(model) is None
    assert "generate" not in vars(model)
    assert len(optimizer._global_optimizer_post_hooks) == hooks


def test_a_pass_of_the_users_can_be_switched_off_by_name() -> None:
    with hybrid_fx.hybridize(
        tiny("llama"), passes=(_times(1.0),), disable_passes=("times",)
    ) as engine:
        assert "times" not in [row.name for row in engine.explain(passes=True).passes]


def test_a_policy_of_the_users_is_tried_before_the_librarys() -> None:
    with hybrid_fx.hybridize(tiny("llama"), policies=(POLICY,)) as engine:
        assert {layer.policy for layer in engine.explain().layers} == {"mine"}


def test_passes_are_told_stage_by_stage_as_data_and_as_a_table() -> None:
    with hybrid_fx.hybridize(tiny("llama"), fusions="all") as engine:
        assert engine.explain().passes == ()
        report = engine.explain(passes=True)
    stages = [row.stage for row in report.passes]
    assert list(dict.fromkeys(stages)) == ["model", "layers", "prefill", "decode"]
    rows = {row.name: row for row in report.passes}
    assert rows["concat_qkv"].count == 2
    assert dict(rows["concat_qkv"].removed) == {"linear": 4}
    assert dict(rows["concat_qkv"].added) == {"concat_rows": 2, "getitem": 6, "split": 2}
    assert rows["thread_kv_decode"].added["attend_one"] == 2
    assert all(row.seconds > 0 for row in report.passes)
    text = str(report)
    for name in rows:
        assert name in text
    assert "4 linear" in text
    told = json.loads(json.dumps(report.as_dict()))["passes"]
    assert [row["name"] for row in told] == [row.name for row in report.passes]


def test_passes_over_the_training_graph_are_told_behind_the_others() -> None:
    ids = torch.randint(3, 40, (2, 5))
    with hybrid_fx.hybridize(tiny("llama"), train_graph=True) as engine:
        engine.train()
        engine(input_ids=ids, labels=ids)
        rows = engine.explain(passes=True).passes
    trained = {row.name: row for row in rows if row.stage == "training"}
    assert rows[-1].stage == "training"
    assert trained["thread_masks"].count == 2
    assert trained["keep_selected_tokens"].count == 1


def test_a_plan_from_the_disk_tells_what_its_passes_did(tmp_path: Path) -> None:
    told = []
    for _ in range(2):
        with hybrid_fx.hybridize(tiny("llama"), cache_dir=str(tmp_path)) as engine:
            told.append(engine.explain(passes=True).passes)
            found = engine.stats.counters["cache_hits_disk"]
    assert found == 1
    assert told[0] == told[1]
    assert len(told[0]) > 8


def test_a_place_that_was_declined_is_counted() -> None:
    with hybrid_fx.hybridize(tiny("gpt2")) as engine:
        rows = {row.name: row for row in engine.explain(passes=True).passes}
    assert rows["concat_qkv"].declined == 0, "GPT-2 has no such roles: nothing was tried"
    assert rows["fuse_mlp"].count == 2
