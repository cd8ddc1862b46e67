"""A trace ends at the first branch on a size that decides, has a limit, and says how it goes."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from capture.failing_models import branching_llama, tiny_jamba, watched
from tiny_models import tiny
from torch._dynamo.exc import InternalTorchDynamoError, Unsupported
from torch._dynamo.symbolic_convert import InstructionTranslatorBase

from hybrid_fx.capture import capture, capture_call
from hybrid_fx.capture.assumed import decides
from hybrid_fx.capture.dynamo import _lasts, trace
from hybrid_fx.capture.watch import Watch
from hybrid_fx.errors import CaptureError, CaptureTimeoutError

FOR_SOME_SIZES = "does what it does for some sizes"


def fails(module: Any, args: Any, out: Any) -> Any:
    raise RuntimeError("the trace came as far as this")


def blocked_llama() -> Any:
    """Behind the branch on a size stands what no trace comes past."""
    model = branching_llama()
    model.lm_head.register_forward_hook(fails)
    return model


def test_a_trace_ends_at_the_first_branch_on_a_size() -> None:
    with pytest.raises(CaptureError, match=FOR_SOME_SIZES) as caught:
        capture(blocked_llama())
    assert "," not in str(caught.value)
    assert caught.value.lasting
    with pytest.raises(CaptureError, match=FOR_SOME_SIZES):
        capture_call(blocked_llama(), {"input_ids": torch.int64})


def test_what_a_failing_jamba_costs_does_not_grow_with_its_layers(monkeypatch) -> None:
    watches = watched(monkeypatch)
    for layers in (2, 8):
        with pytest.raises(CaptureError, match=FOR_SOME_SIZES):
            capture(tiny_jamba(layers))
    two, eight = (watch.lines for watch in watches)
    assert eight < 1.5 * two < 15000


def test_without_upstreams_method_a_trace_goes_on_and_comes_to_the_same_end(monkeypatch) -> None:
    monkeypatch.setattr("hybrid_fx.capture.watch._interpreter", lambda: object)
    watches = watched(monkeypatch)
    model = branching_llama()
    with pytest.raises(CaptureError, match=FOR_SOME_SIZES):
        capture(model, timeout=1e-9)
    assert watches[0].lines == 0


def test_a_condition_that_ends_when_inputs_are_found_alike_does_not_decide() -> None:
    """GPT-2 asks whether the rows of the mask divide those of the ids before it adds them."""
    capture_call(tiny("gpt2"), {"input_ids": torch.int64, "attention_mask": torch.int64})


def test_nothing_is_said_to_decide_where_upstream_keeps_no_table_of_values() -> None:
    import sympy

    class Sizes:
        def simplify(self, condition: Any) -> Any:
            return condition

    size = sympy.Symbol("s0", positive=True, integer=True)
    assert not decides(Sizes(), size > 5)


def test_a_trace_has_a_limit_in_any_thread() -> None:
    caught: list[CaptureError] = []

    def attempt() -> None:
        try:
            capture(tiny("llama"), timeout=1e-9)
        except CaptureError as error:
            caught.append(error)

    threads = threading.enumerate()
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    (error,) = caught
    assert isinstance(error, CaptureTimeoutError)
    assert "capture_timeout=1e-09 seconds" in str(error)
    assert not error.lasting
    assert threading.enumerate() == threads


def test_dynamo_is_as_it_was_behind_a_trace_that_was_stopped() -> None:
    before = vars(InstructionTranslatorBase)["starts_line"]
    model = tiny("llama")
    with pytest.raises(CaptureTimeoutError):
        capture(model, timeout=1e-9)
    assert vars(InstructionTranslatorBase)["starts_line"] is before
    assert capture(model).graph.nodes
    twice = torch.compile(lambda x: x + x, backend="eager", fullgraph=True)
    assert twice(torch.ones(2)).tolist() == [2.0, 2.0]


def test_a_trace_says_where_it_begins_and_ends(caplog) -> None:
    with caplog.at_level(logging.INFO, "hybrid_fx"):
        capture(tiny("llama"))
    said = [record.getMessage() for record in caplog.records if record.name == "hybrid_fx"]
    begin, *_, end = said  # a slow machine has something to say between
    assert begin == "tracing LlamaForCausalLM"
    assert end.startswith("tracing LlamaForCausalLM took ")


def many_lines(x: torch.Tensor) -> torch.Tensor:
    for _ in range(40):
        x = x + 1
        x = x * 2
    return x


@pytest.mark.parametrize(("timeout", "limit"), [(None, "no limit"), (9999.0, "9999 s at most")])
def test_a_long_trace_says_that_it_goes_on_and_less_and_less_often(caplog, timeout, limit) -> None:
    seconds = iter(range(10**6))
    watch = Watch("it", timeout, clock=lambda: next(seconds))
    trace(many_lines, torch.ones(3), watch=watch)
    assert watch.seconds > 80
    said = [record.getMessage() for record in caplog.records if record.name == "hybrid_fx"]
    after = (6, 11, 21, 41, 81)
    assert said[:5] == [f"still tracing it after {n} s (capture_timeout: {limit})" for n in after]
    assert len(said) < 9


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (Unsupported("a call of it"), True),
        (caused(Unsupported("a call of it"), ValueError("no")), True),
        (caused(Unsupported("a call of it"), MemoryError()), False),
        (InternalTorchDynamoError("RecursionError: too deep"), False),
        (OSError("no space"), False),
    ],
)
def test_only_what_dynamo_says_of_the_code_lasts(error: BaseException, lasting: bool) -> None:
    assert _lasts(error) == lasting
