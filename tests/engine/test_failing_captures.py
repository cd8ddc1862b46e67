"""A capture that fails: the module generates, it is said why, and nothing is traced twice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from capture.failing_models import branching_llama, tiny_jamba
from tiny_models import prompt, tiny
from torch.overrides import BaseTorchFunctionMode

import hybrid_fx
from hybrid_fx.cache import key
from hybrid_fx.errors import ConfigError, StrictError

CALL = {**prompt((5, 3)), "max_new_tokens": 4, "do_sample": False}
WHY = "runs as transformers' module: not captured: "
TOO_LONG = "tracing took longer than capture_timeout=1e-06 seconds"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions that were traced, one entry a trace."""
    traced: list[Any] = []
    compiles: Callable[..., Any] = torch.compile

    def counting(function: Any, **options: Any) -> Any:
        traced.append(function)
        return compiles(function, **options)

    monkeypatch.setattr(torch, "compile", counting)
    return traced


def generate_both(model: Any, **options: Any) -> Any:
    """An engine that has generated the tokens of transformers, its model's."""
    wanted = model.generate(**CALL)
    engine = hybrid_fx.hybridize(model, **options)
    assert engine.generate(**CALL).equal(wanted)
    return engine


def test_a_jamba_generates_as_its_module_and_is_heard(tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO, "hybrid_fx"):
        engine = generate_both(tiny_jamba(), cache_dir=str(tmp_path))
    said = [record.getMessage() for record in caplog.records if record.name == "hybrid_fx"]
    assert said[0] == "tracing JambaForCausalLM"
    assert said[-2].startswith("tracing JambaForCausalLM took ")
    assert said[-1].startswith(f"JambaForCausalLM {WHY}the forward or a hook in it does what it")
    (reason,) = engine.stats.fallbacks
    assert "for some sizes: " in reason


def test_a_later_engine_knows_of_the_failure_and_does_not_trace(tmp_path, traces, caplog) -> None:
    generate_both(branching_llama(), cache_dir=str(tmp_path))
    assert len(traces) == 1
    engine = generate_both(branching_llama(seed=1), cache_dir=str(tmp_path))
    assert len(traces) == 1
    (file,) = tmp_path.iterdir()
    (reason,) = engine.stats.fallbacks
    assert reason.endswith(f"(known from an earlier capture; delete {file} to try again)")
    assert f"LlamaForCausalLM {WHY}" in caplog.records[-1].getMessage()
    file.unlink()
    generate_both(branching_llama(), cache_dir=str(tmp_path))
    assert len(traces) == 2
    with pytest.raises(StrictError, match="known from an earlier capture"):
        hybrid_fx.hybridize(branching_llama(), cache_dir=str(tmp_path), strict=True).generate(
            **CALL
        )


def test_what_fails_within_a_function_mode_of_the_callers_is_not_remembered(tmp_path) -> None:
    with BaseTorchFunctionMode():
        generate_both(branching_llama(), cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_structure_that_comes_back_is_not_traced_again(traces) -> None:
    engine = generate_both(branching_llama(), disk_cache=False)
    handle = engine.module.lm_head.register_forward_pre_hook(lambda module, args: None)
    engine.generate(**CALL)
    handle.remove()
    engine.generate(**CALL)
    assert len(traces) == 2


@pytest.mark.parametrize("other", ["versions", "default dtype", "options of Dynamo"])
def test_a_failure_under_other_assumptions_is_tried_again(
    tmp_path: Path, traces: list[Any], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    generate_both(branching_llama(), cache_dir=str(tmp_path))
    if other == "versions":
        monkeypatch.setattr(key, "versions", lambda: (("torch", "99.0"),))
    engine = hybrid_fx.hybridize(branching_llama(), cache_dir=str(tmp_path))
    dtype = torch.get_default_dtype()
    try:
        if other == "default dtype":
            torch.set_default_dtype(torch.float64)
        asks = other == "options of Dynamo"
        with torch._dynamo.config.patch(capture_scalar_outputs=asks):
            engine.generate(**CALL)
    finally:
        torch.set_default_dtype(dtype)
    assert len(traces) == 2


def test_an_error_within_dynamo_is_not_remembered(tmp_path, traces, monkeypatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("torch._dynamo.symbolic_convert.InstructionTranslatorBase.step", fails)
        engine = hybrid_fx.hybridize(tiny("llama"), cache_dir=str(tmp_path))
        engine.generate(**CALL)
        assert len(engine.stats.fallbacks) == 1
    assert list(tmp_path.iterdir()) == []
    assert not generate_both(tiny("llama"), cache_dir=str(tmp_path)).stats.fallbacks


def test_behind_capture_timeout_the_module_generates_and_no_file_says_so(tmp_path, traces) -> None:
    folder = {"cache_dir": str(tmp_path)}
    engine = generate_both(tiny("llama"), capture_timeout=1e-6, **folder)
    (reason,) = engine.stats.fallbacks
    assert TOO_LONG in reason
    handle = engine.module.lm_head.register_forward_pre_hook(lambda module, args: None)
    engine.generate(**CALL)
    handle.remove()
    engine.generate(**CALL)
    assert len(traces) == 2  # of this structure once
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StrictError, match=TOO_LONG):
        hybrid_fx.hybridize(tiny("llama"), capture_timeout=1e-6, strict=True, **folder).generate(
            **CALL
        )
    assert not generate_both(tiny("llama"), capture_timeout=None, **folder).stats.fallbacks


def test_behind_capture_timeout_the_module_trains(tmp_path) -> None:
    batch = prompt((5, 3))
    losses = []
    options = {"train_graph": True, "capture_timeout": 1e-6, "cache_dir": str(tmp_path)}
    for strict in (False, True):
        model = tiny("llama").train()
        losses.append(model(**batch, labels=batch["input_ids"]).loss.item())
        engine = hybrid_fx.hybridize(model, strict=strict, **options)
        if strict:
            with pytest.raises(StrictError, match=TOO_LONG):
                engine(**batch, labels=batch["input_ids"])
        else:
            losses.append(engine(**batch, labels=batch["input_ids"]).loss.item())
            (reason,) = engine.stats.fallbacks
            assert reason.startswith(f"training forward: not captured: {TOO_LONG}")
    assert len(set(losses)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_training_graph_that_failed_is_not_tried_in_a_later_engine(tmp_path, traces) -> None:
    batch = prompt((5, 3))
    for known in (False, True):
        engine = hybrid_fx.hybridize(branching_llama(), train_graph=True, cache_dir=str(tmp_path))
        engine.train()
        engine(**batch, labels=batch["input_ids"])
        (reason,) = engine.stats.fallbacks
        assert ("known from an earlier capture" in reason) == known
    assert len(traces) == 1


@pytest.mark.parametrize("seconds", [0, -1.0, True, "60", float("nan"), float("inf")])
def test_a_limit_is_a_positive_number_of_seconds_or_none(seconds: object) -> None:
    with pytest.raises(ConfigError, match=r"capture_timeout=.* must be a positive number"):
        hybrid_fx.HybridConfig(capture_timeout=seconds)  # type: ignore[arg-type]
