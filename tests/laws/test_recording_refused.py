"""A decode step that cannot be recorded, or is recorded wrong, runs as it is and says why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from laws.against_hf import same_tokens
from laws.recorded_engines import GREEDY, LOOKS, engine_of, steps_of
from tape import TapeRecorder, taped
from tiny_models import prompt, tiny

from hybrid_fx.runtime import attend_at as attention
from hybrid_fx.runtime import runner


def test_a_step_that_waits_for_the_device_runs_as_it_is_and_says_so_once(
    tapes: type[TapeRecorder], caplog: pytest.LogCaptureFixture
) -> None:
    with engine_of(tiny("llama"), passes=(LOOKS,)) as engine, caplog.at_level(logging.WARNING):
        for lengths in ((5, 3), (4,)):
            same_tokens(engine, **prompt(lengths), **GREEDY)
        why = "_local_scalar_dense reads a result on the host"
        assert [entry.getMessage() for entry in caplog.records] == [
            f"decode steps are not recorded, and run as they are: {why}"
        ]
        notes = [note for note in engine.explain().notes if "cudagraphs" in note]
        assert notes == [f'graph="cudagraphs": decode steps are not recorded: {why}']
        assert not engine.stats.fallbacks
    assert not tapes.tapes


def test_a_recording_that_says_something_else_is_found_out(
    tapes: type[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*given_: Any) -> Any:
        return attention.attend_at(*given_) * 1.5

    monkeypatch.setattr(runner, "attend_at", wrong)
    with engine_of(tiny("llama")) as engine:
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
        assert "its logits differ by" in steps_of(engine).failure
        assert len(steps_of(engine)) == 0


def test_a_model_that_went_where_nothing_records_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with taped():
        engine = engine_of(tiny("llama"))
    same_tokens(engine, **prompt((5, 3)), **GREEDY)
    assert "on cpu, so decode steps are not recorded" in caplog.text
    assert any("decode steps run as they are" in note for note in engine.explain().notes)
    engine.close()
