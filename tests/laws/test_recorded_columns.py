"""Which columns of the workspace a recorded decode step reads, and which of them count."""

from __future__ import annotations

import copy

import torch
from laws.against_hf import same_tokens
from laws.recorded_engines import GREEDY, engine_of, sizes_of
from tape import TapeRecorder
from tiny_models import VOCAB, prompt, tiny


def test_weights_that_held_nan_leave_nothing_behind(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama")
    good = copy.deepcopy(model.state_dict())
    with engine_of(model) as engine:
        engine.generate(**prompt((20, 30)), max_new_tokens=70, do_sample=False)
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight.fill_(torch.nan)
        engine.generate(**prompt((20, 30)), max_new_tokens=70, do_sample=False)
        model.load_state_dict(good)
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
    assert len(tapes.tapes) == 1


def test_a_session_that_outgrows_its_rows_goes_on(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama", max_position_embeddings=300)
    ids = torch.randint(VOCAB, (2, 262))
    at = torch.arange(262).expand(2, 262)
    with engine_of(model) as engine:
        session = engine._graphs.ready().session(batch=2, capacity=9)
        session.forward(ids[:, :252], at[:, :252])
        parts = [session.forward(ids[:, i : i + 1], at[:, i : i + 1]) for i in range(252, 262)]
        session.close()
        assert sizes_of(engine) == [(2, 512)], "in memory of their own"
        with torch.no_grad():
            wanted = model(input_ids=ids, position_ids=at).logits[:, 252:]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-4)
    assert len(tapes.tapes) == 2


def test_columns_that_nobody_uses_are_not_read(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama", max_position_embeddings=600)
    with engine_of(model, max_out_tokens=600) as engine:
        for length in (252, 510, 252):
            same_tokens(engine, **prompt((length, 9)), **GREEDY)
        assert engine._graphs.runner.workspace.pitch == 768
        assert sizes_of(engine) == [(2, 768), (2, 256), (2, 512)]
        assert [tape.replays for tape in tapes.tapes] == [8, 6, 4]


def test_columns_that_were_taken_back_are_seen_anew(tapes: type[TapeRecorder]) -> None:
    """As assisted decoding does; a padding column among them is no padding afterwards."""
    model = tiny("llama")
    ids, at = torch.randint(VOCAB, (2, 12)), torch.arange(12).expand(2, 12)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 3:] = False
    with engine_of(model) as engine:
        session = engine._graphs.ready().session(batch=2, capacity=12)
        session.forward(ids[:, :6], at[:, :6], valid)
        session.forward(ids[:, 6:7], at[:, 6:7])
        session.crop(3)
        parts = [session.forward(ids[:, i : i + 1], at[:, i : i + 1]) for i in range(3, 9)]
        session.close()
        with torch.no_grad():
            wanted = model(input_ids=ids[:, :9], position_ids=at[:, :9]).logits[:, 3:]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-5)


def test_a_column_that_is_padding_when_it_comes_is_never_seen(tapes: type[TapeRecorder]) -> None:
    ids, at = torch.randint(VOCAB, (2, 9)), torch.arange(9).expand(2, 9)
    found = []
    with engine_of(tiny("llama")) as engine:
        for recorded_ in (False, True):
            session = engine._graphs.ready().session(batch=2, capacity=9, recorded=recorded_)
            session.forward(ids[:, :3], at[:, :3])
            for i in range(3, 9):
                valid = torch.tensor([[i != 5], [True]]) if i in (4, 5) else None
                logits = session.forward(ids[:, i : i + 1], at[:, i : i + 1], valid)
            session.close()
            found.append(logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(tapes.tapes) == 1
