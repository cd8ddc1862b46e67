"""Law 8: engines do not see each other, threads wait, and an interrupt leaves nothing broken."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws.against_hf import assert_bit_identical, hf_generate, tensors_of
from laws.test_given_back import surroundings
from tiny_models import adapted, prompt, reweigh, tiny
from transformers import LogitsProcessor

import hybrid_fx
from hybrid_fx.capture import capture
from hybrid_fx.capture.dynamo import trace

CALL = prompt((4, 1, 7), 6) | {"max_new_tokens": 10}


def test_engines_over_several_models_alternate() -> None:
    models = [tiny("gpt2", 1, layers=1), tiny("llama", 2, layers=1), tiny("llama", 3, layers=1)]
    engines = [hybrid_fx.hybridize(model) for model in models]
    for round_ in range(4):
        for index, (model, engine) in enumerate(zip(models, engines, strict=True)):
            call = prompt((3 + index, 1), round_) | {"max_new_tokens": 6}
            others = [e.weight_version for e in engines if e is not engine]
            reweigh(model, 10 * round_ + index)
            assert engine.generate(**call).tolist() == hf_generate(model, **call).tolist()
            assert [e.weight_version for e in engines if e is not engine] == others
    assert [e.stats.counters["prepares"] for e in engines] == [4, 4, 4]
    engines[1].close()
    for model, engine in zip(models, engines, strict=True):
        assert model.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        assert engine.stats.counters["hf_forwards"] == 0
    for engine in engines:
        engine.close()


def test_one_model_has_one_engine() -> None:
    model = tiny("gpt2", layers=1)
    with hybrid_fx.hybridize(model) as engine:
        assert hybrid_fx.hybridize(model) is engine
        with pytest.raises(hybrid_fx.ConfigError, match="hybridized already"):
            hybrid_fx.hybridize(model, lora="side")
    with hybrid_fx.hybridize(model, lora="side") as other:
        assert other is not engine


def test_threads_on_one_engine_wait_for_each_other() -> None:
    model = tiny("gpt2", layers=1)
    with hybrid_fx.hybridize(model) as engine:
        calls = [prompt((n, 1, 5), n) | {"max_new_tokens": 12} for n in range(1, 7)]
        wanted = [hf_generate(model, **call).tolist() for call in calls]
        got: dict[int, Any] = {}

        def run(index: int) -> None:
            try:
                got[index] = engine.generate(**calls[index]).tolist()
            except Exception as error:  # shown by the comparison below
                got[index] = error

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [got[index] for index in range(len(calls))] == wanted
        assert engine.stats.counters["hf_forwards"] == 0


class Breaks(LogitsProcessor):
    """Raises at its third call."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return scores


def fails_at(call: int, error: BaseException, plain: Callable[..., Any]) -> Callable[..., Any]:
    count = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise error
        return plain(*args, **kwargs)

    return function


@pytest.fixture(params=["plain", "lora"])
def model(request: pytest.FixtureRequest) -> Any:
    model = tiny("llama", layers=1)
    return (
        adapted(model, target_modules=["q_proj", "up_proj"]) if request.param == "lora" else model
    )


ERRORS = [RuntimeError("broken"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["processor", "decode", "prefill", "prepare", "beams"])
def test_an_interrupted_generate_leaves_everything_usable(
    model: Any, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hybrid_fx.hybridize(model) as engine:
        engine.train()
        engine.generate(**CALL)
        before, weights = surroundings(model), tensors_of(model)
        call: dict[str, Any] = dict(CALL)
        functions = engine._graphs.runner._functions
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            if where == "processor":
                call["logits_processor"] = [Breaks(error)]
            elif where == "beams":
                call |= {"logits_processor": [Breaks(error)], "num_beams": 2}
            else:
                at = 3 if where == "decode" else 1
                failing = fails_at(at, error, functions[where][where])
                patch.setitem(functions[where], where, failing)
            if where == "prepare":
                engine.weights_changed()
            engine.generate(**call)
        assert surroundings(model) == before
        assert all(module.training for module in model.modules())
        assert_bit_identical(tensors_of(model), weights)
        ids = torch.tensor([[3, 4, 5]])
        engine(input_ids=ids, labels=ids).loss.backward()
        model.eval()
        assert engine.generate(**CALL).tolist() == hf_generate(model, **CALL).tolist()
        assert engine.stats.counters["hf_forwards"] == 0


@pytest.mark.parametrize("error", ERRORS, ids=["error", "interrupt"])
def test_an_interrupted_capture_leaves_everything_usable(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2", layers=1).train()
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        before = surroundings(model)
        with monkeypatch.context() as patch:
            patch.setitem(capture.__globals__, "trace", fails_at(1, error, trace))
            if isinstance(error, Exception):
                engine.generate(**CALL)  # reported, and generated by the module
                assert sum(engine.stats.fallbacks.values()) == 1
            else:
                with pytest.raises(KeyboardInterrupt):
                    engine.generate(**CALL)
        assert surroundings(model) == before
        if not isinstance(error, Exception):
            got = engine.generate(**CALL).tolist()
            assert engine.stats.counters["captures"] == 1
            assert engine.stats.counters["hf_forwards"] == 0
            model.eval()
            assert got == hf_generate(model, **CALL).tolist()


def test_a_generate_within_a_generate_is_refused_and_the_outer_one_goes_on() -> None:
    model = tiny("gpt2", layers=1)
    refused = []

    class Nested(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if not refused:
                with pytest.raises(hybrid_fx.HybridError) as caught:
                    engine.generate(**CALL)
                refused.append(caught.value)
            return scores

    with hybrid_fx.hybridize(model) as engine:
        got = engine.generate(**CALL, logits_processor=[Nested()])
        assert got.tolist() == hf_generate(model, **CALL).tolist()
        assert len(refused) == 1
