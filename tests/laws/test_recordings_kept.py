"""Recordings of decode steps: which are made, which are kept, and when they are dropped."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from laws.against_hf import hf_generate, same_tokens
from laws.recorded_engines import GREEDY, engine_of, sizes_of, steps_of
from tape import TapeRecorder
from tiny_models import VOCAB, adapted, prompt, randomize_adapters, tiny

from hybrid_fx.runtime import recorded


def test_one_recording_serves_all_positions_of_all_calls(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        for length, new in ((2, 40), (9, 5), (30, 60)):
            asked = prompt((length, length)) | {"max_new_tokens": new, "do_sample": False}
            same_tokens(engine, **asked)
        assert sizes_of(engine) == [(2, 256)]
        assert [tape.replays for tape in tapes.tapes] == [39 + 4 + 59]
        assert engine.stats.counters["recordings"] == 1
        assert engine.stats.seconds["record"] > 0
        assert 'graph="cudagraphs": recordings of the decode step: 1' in engine.explain().notes


def test_rows_that_leave_step_down_through_powers_of_two(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        asked = prompt((3, 9, 1, 6, 2, 5)) | {"max_new_tokens": [30, 22, 4, 12, 17, 8]}
        got = engine.generate(**asked, do_sample=False)
        assert [rows for rows, _ in sizes_of(engine)] == [6, 4, 2, 1]
        want = hf_generate(engine.module, **prompt((3, 9, 1, 6, 2, 5)), max_new_tokens=30)
        for row, new in enumerate(asked["max_new_tokens"]):
            assert got[row, : 9 + new].tolist() == want[row, : 9 + new].tolist()
        engine.generate(**asked, do_sample=False)
        assert len(tapes.tapes) == 4


def test_rows_that_are_not_apart_are_never_beside_others(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        engine._graphs.ready().rows_apart = False
        session = engine._graphs.runner.session(batch=4, capacity=9)
        ids = torch.randint(VOCAB, (4, 4))
        session.forward(ids, torch.arange(4).expand(4, 4))
        session.reorder(torch.arange(3))
        session.forward(ids[:3, :1], torch.full((3, 1), 4))
        session.close()
        assert sizes_of(engine) == [(3, 256)]


@pytest.mark.parametrize("options", [{}, {"share_storage": True}, {"disable_passes": True}])
def test_a_weight_step_keeps_the_recordings_and_gives_the_new_tokens(
    tapes: type[TapeRecorder], options: dict[str, Any]
) -> None:
    model = tiny("llama")
    plain = {"disable_passes": ("pack_weights",)} if options else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    with engine_of(model, **options | plain) as engine:
        seen = {str(same_tokens(engine, **prompt((5, 3)), **GREEDY))}
        for _ in range(2):
            engine.train()
            loss = engine(input_ids=torch.randint(VOCAB, (2, 8))).logits.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.eval()
            seen.add(str(same_tokens(engine, **prompt((5, 3)), **GREEDY)))
        assert len(seen) == 3, "a stale weight would show"
        assert engine.stats.counters["prepares"] == 3
    assert len(tapes.tapes) == 1


@pytest.mark.parametrize("lora", ["fold", "side"])
def test_adapters_that_change_keep_the_recordings(tapes: type[TapeRecorder], lora: str) -> None:
    model = adapted(tiny("llama"))
    with engine_of(model, lora=lora) as engine:
        for seed in range(3):
            randomize_adapters(model, seed, size=0.3)
            same_tokens(engine, **prompt((5, 3)), **GREEDY)
        assert engine.stats.counters["prepares"] == 3
    assert len(tapes.tapes) == 1


def test_weights_that_lie_elsewhere_are_recorded_anew(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama")
    with engine_of(model, disable_passes=("pack_weights",)) as engine:
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
        norm = model.model.norm.weight
        norm.data = norm.data.flip(0).clone()
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
        assert sizes_of(engine) == [(2, 256)]
    assert len(tapes.tapes) == 2


def test_more_memory_is_recorded_anew_and_the_old_is_dropped(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        same_tokens(engine, **prompt((5,)), **GREEDY)
        same_tokens(engine, **prompt((5, 3, 2)), **GREEDY)
        assert sizes_of(engine) == [(3, 256)]
        same_tokens(engine, **prompt((5,)), **GREEDY)
        assert sizes_of(engine) == [(3, 256), (1, 256)]
        same_tokens(engine, **prompt((5, 3, 2)), **GREEDY)
        assert sizes_of(engine) == [(1, 256), (3, 256)]
    assert len(tapes.tapes) == 3


def test_releasing_drops_all_recordings(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama"), release_inference_cache=True) as engine:
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
        assert len(steps_of(engine)) == steps_of(engine).nbytes == engine.stats.recorded_bytes == 0
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
    assert len(tapes.tapes) == 2
    engine = engine_of(tiny("llama"))
    same_tokens(engine, **prompt((5, 3)), **GREEDY)
    report = engine.explain()
    held = sum(tape.nbytes for tape in tapes.tapes[2:]) + 2 * 256 + 8 * (2 + 2 + 1)
    assert report.recorded_bytes == engine.stats.as_dict()["recorded_bytes"] == held > 0
    assert report.eval_bytes == report.kv_bytes + report.prepared_bytes + report.recorded_bytes
    assert "recorded decode steps" in str(report)
    kept = steps_of(engine)
    released = tapes.released
    engine.close()
    assert len(kept) == kept.nbytes == 0
    assert tapes.released > released


def test_the_recordings_that_served_longest_ago_go_first(
    tapes: type[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "_MOST", 2)
    with engine_of(tiny("llama")) as engine:
        for rows in (3, 2, 3, 1):
            same_tokens(engine, **prompt((4,) * rows), **GREEDY)
        assert sizes_of(engine) == [(3, 256), (1, 256)]


def test_engines_share_nothing_and_models_are_copied_as_before(tapes: type[TapeRecorder]) -> None:
    one, two = (engine_of(tiny("llama", seed)) for seed in (0, 1))
    for engine in (one, two, one):
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
    assert len(tapes.tapes) == 2
    assert [sizes_of(engine) for engine in (one, two)] == [[(2, 256)]] * 2
    other = copy.deepcopy(one.module)
    stored = pickle.loads(pickle.dumps(other.state_dict()))
    assert all(map(torch.equal, stored.values(), one.module.state_dict().values()))
    two.close()
    same_tokens(one, **prompt((5, 3)), **GREEDY)
    assert len(tapes.tapes) == 2
    one.close()


def test_a_call_in_inference_mode_records_memory_that_later_calls_may_write(
    tapes: type[TapeRecorder],
) -> None:
    model = tiny("llama")
    want = hf_generate(model, **prompt((5, 3)), **GREEDY)
    with engine_of(model) as engine:
        with torch.inference_mode():
            assert torch.equal(engine.generate(**prompt((5, 3)), **GREEDY), want)
        assert torch.equal(engine.generate(**prompt((5, 3)), **GREEDY), want)
    assert len(tapes.tapes) == 1
