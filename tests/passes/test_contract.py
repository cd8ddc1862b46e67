"""What a pipeline accepts: contracts that fit, and errors that name both passes and the remedy."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Collection
from pathlib import Path

import pytest
from torch import fx

from hybrid_fx.passes.contract import (
    ANY,
    FACTS,
    MODES,
    Context,
    Pass,
    PassResult,
    Pipeline,
    PipelineError,
)
from hybrid_fx.passes.operators import OPERATORS
from hybrid_fx.passes.pipeline import (
    DECODE,
    NORMALIZE,
    OPTIONAL,
    PACK,
    PASSES,
    PREFILL,
    STAGE,
    STREAM,
    TRAIN,
)

README = Path(__file__).parents[2] / "passes" / "README.md"


def _nothing(graph: fx.Graph, context: Context) -> PassResult:
    return PassResult(0)


def _other(graph: fx.Graph, context: Context) -> PassResult:
    return PassResult(0)


def _pass(
    name: str,
    requires: Collection[str] = (),
    provides: Collection[str] = (),
    conflicts: Collection[str] = (),
) -> Pass:
    return Pass(
        name,
        _nothing,
        requires=frozenset(requires),
        provides=frozenset(provides),
        conflicts=frozenset(conflicts),
    )


MAKES = _pass("makes", provides=["fact"])
NEEDS = _pass("needs", requires=["fact"])
SHUNS = _pass("shuns", conflicts=["fact"])


def test_a_requirement_met_by_a_pass_before_is_accepted() -> None:
    assert Pipeline((MAKES, NEEDS)).names == ("makes", "needs")
    assert Pipeline((MAKES, NEEDS)).facts == {"fact"}


def test_a_requirement_met_by_what_is_given_is_accepted() -> None:
    assert len(Pipeline((NEEDS,), given=frozenset({"fact"}))) == 1


def test_a_requirement_met_too_late_names_both_passes_and_the_move() -> None:
    with pytest.raises(PipelineError, match=r"needs requires 'fact'.*move makes before needs"):
        Pipeline((NEEDS, MAKES))


def test_a_requirement_that_none_meets_says_what_may_be_done() -> None:
    with pytest.raises(PipelineError, match=r"leave needs out, or say given=\{'fact'\}"):
        Pipeline((NEEDS,))


def test_a_misspelt_fact_is_shown_its_nearest() -> None:
    with pytest.raises(PipelineError, match="did you mean 'canonical'"):
        Pipeline((_pass("mine", requires=["canonicl"]),), given=frozenset({"canonical"}))


def test_a_pass_cannot_provide_what_it_requires_itself() -> None:
    with pytest.raises(PipelineError, match="but itself"):
        Pipeline((_pass("both", requires=["fact"], provides=["fact"]),))


def test_a_conflict_names_both_passes_and_the_move() -> None:
    with pytest.raises(PipelineError, match=r"shuns conflicts with 'fact', which makes .*move "):
        Pipeline((MAKES, SHUNS))
    assert Pipeline((SHUNS, MAKES)).names == ("shuns", "makes")


def test_a_conflict_with_what_is_given_says_so() -> None:
    with pytest.raises(PipelineError, match="shuns conflicts with 'fact', which the pipeline is"):
        Pipeline((SHUNS,), given=frozenset({"fact"}))


def test_a_pass_that_conflicts_with_itself_runs_once() -> None:
    once = _pass("once", provides=["fact"], conflicts=["fact"])
    assert len(Pipeline((once,))) == 1
    with pytest.raises(PipelineError, match="once runs twice"):
        Pipeline((once, once))


def test_two_passes_of_one_name_are_refused_and_one_pass_may_run_twice() -> None:
    assert len(Pipeline((MAKES, MAKES))) == 2
    with pytest.raises(PipelineError, match="two different passes are called makes"):
        Pipeline((MAKES, Pass("makes", _other, requires=frozenset())))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "two words"}, "must be an identifier"),
        ({"run": "no function"}, "must be a function"),
        ({"requires": "canonical"}, "requires='canonical' must be a set of strings"),
        ({"may_add": {1}}, "may_add=.* must be a set of strings"),
        ({"modes": {"test"}}, "mode 'test' is not known"),
    ],
)
def test_a_pass_with_a_wrong_field_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        Pass(**{"name": "mine", "run": _nothing, **fields})  # type: ignore[arg-type]


def test_a_sum_runs_the_second_behind_the_first() -> None:
    both = Pipeline((MAKES,)) + Pipeline((NEEDS,), given=frozenset({"fact"}))
    assert both.names == ("makes", "needs")
    assert both.given == frozenset(), "what the first leaves need not be given"
    open_end = Pipeline((_pass("first"),)) + Pipeline((NEEDS,), given=frozenset({"fact"}))
    assert open_end.given == {"fact"}


def test_a_sum_whose_parts_do_not_fit_is_refused() -> None:
    with pytest.raises(PipelineError, match="shuns conflicts with 'fact', which makes"):
        Pipeline((MAKES,)) + Pipeline((SHUNS,))


def test_leaving_out_a_pass_that_another_needs_is_refused() -> None:
    pipeline = Pipeline((MAKES, NEEDS))
    assert pipeline.without(["needs"]).names == ("makes",)
    with pytest.raises(PipelineError, match="needs requires 'fact'"):
        pipeline.without(["makes"])


def test_leaving_out_a_pass_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(PipelineError, match=r"no pass is called 'concat_qvk'; .*'concat_qkv'"):
        OPTIONAL.without(["concat_qvk"])


def test_a_pass_is_inserted_as_late_as_its_contract_allows() -> None:
    pipeline = Pipeline((_pass("first"), MAKES, _pass("last")))
    assert pipeline.insert(NEEDS).names == ("first", "makes", "last", "needs")
    assert pipeline.insert(SHUNS).names == ("first", "shuns", "makes", "last")
    with pytest.raises(PipelineError, match="both requires 'nowhere'"):
        pipeline.insert(_pass("both", requires=["nowhere"]))


def test_pipelines_and_passes_are_frozen_and_compare_by_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MAKES.name = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPTIONAL.passes = ()  # type: ignore[misc]
    assert Pipeline((MAKES, NEEDS)) == Pipeline((MAKES,)) + Pipeline((NEEDS,), frozenset({"fact"}))
    assert hash(Pipeline((MAKES,))) == hash(Pipeline((MAKES,)))


def test_the_whole_pipeline_fits_together_and_its_order_matters() -> None:
    for last, absent in ((PREFILL, set()), (DECODE, {"takes_embeds"})):
        whole = NORMALIZE + OPTIONAL + PACK + STAGE + last
        assert whole.given == frozenset()
        assert whole.facts | TRAIN.facts | STREAM.facts == set(FACTS) - absent
    rng = random.Random(0)
    refused = 0
    for _ in range(100):
        order = list(OPTIONAL)
        rng.shuffle(order)
        try:
            Pipeline(tuple(order), given=OPTIONAL.given)
        except PipelineError:
            refused += 1
    assert 50 < refused < 100, "most orders are wrong, and some besides the usual one are right"


def test_a_graph_is_threaded_once() -> None:
    with pytest.raises(PipelineError, match="thread_kv_decode conflicts with 'threaded', which "):
        PREFILL + DECODE


def test_adapters_fold_before_their_linears_are_joined() -> None:
    order = OPTIONAL.without(["fold_lora"])
    with pytest.raises(PipelineError, match="move fold_lora before concat_qkv"):
        Pipeline((*order, PASSES["fold_lora"]), given=OPTIONAL.given)


def test_the_passes_speak_of_the_facts_of_the_table_and_every_fact_has_its_pass() -> None:
    spoken: set[str] = set()
    for one in PASSES.values():
        assert one.requires | one.conflicts <= set(FACTS)
        assert one.provides, one.name
        spoken |= one.provides
    assert spoken == set(FACTS)


def test_what_passes_may_add_is_of_the_operator_table() -> None:
    for one in PASSES.values():
        assert one.may_add == ANY or one.may_add <= set(OPERATORS), one.name
        assert one.modes <= MODES


def test_what_writes_memory_or_adds_inputs_is_for_inference_alone() -> None:
    training = (OPTIONAL + STAGE + PREFILL).sound_in("training")
    assert training.names == (
        "fuse_rms_norm",
        "concat_qkv",
        "concat_gate_up",
        "fuse_add_norm",
        "gather_weights",
    )
    assert not any(one.inputs for one in training)
    with pytest.raises(PipelineError, match="mode 'eval' is not known"):
        OPTIONAL.sound_in("eval")


def test_the_table_of_facts_in_the_readme_is_that_of_the_library() -> None:
    text = README.read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (`.*`) \|$", text, re.M)
    told = {
        fact: (meaning.replace("`", ""), set(re.findall(r"`(\w+)`", by)))
        for fact, meaning, by in rows
    }
    providers = {
        fact: {name for name, one in PASSES.items() if fact in one.provides} for fact in FACTS
    }
    assert told == {fact: (meaning, providers[fact]) for fact, meaning in FACTS.items()}


def test_the_fields_of_a_pass_stand_in_the_readme() -> None:
    text = README.read_text()
    for field in ("requires", "provides", "conflicts", "may_add", "exact", "modes", "inputs"):
        assert f"| `{field}` |" in text
