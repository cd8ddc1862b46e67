"""Claims about the memory of inference under DeepSpeed, checked on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import call, ds_config, make, start, train, weights
from memory_ledger import live_bytes, without_collector

from hybrid_fx.errors import RankError

#: Bytes of the numbers that two ranks exchange in a round: gloo's own thread lets go of the last
#: ones a moment later.
_ROUND = 3 * 8 * 8


def _right_padded(rank: int) -> dict[str, Any]:
    given = call(rank)
    return given | {name: given[name].flip(1) for name in ("input_ids", "attention_mask")}


def _config(stage: int, *, release: bool) -> dict[str, Any]:
    config = ds_config(stage)
    config["hybrid_engine"]["release_inference_cache"] = release
    return config


def _growth(engine: Any, given: dict[str, Any]) -> tuple[int, int]:
    """Bytes more than before: right after a generate, and back in train mode."""
    engine.train()
    with without_collector():
        before = live_bytes()
        engine.eval()
        engine.generate(**given)
        generated = live_bytes() - before
        engine.train()
        return generated, live_bytes() - before


def nothing_of_inference_remains(rank: int, stage: int, lora: bool | str) -> None:
    """After each route, after every switch, and after an error that is still looked at."""
    engine = start(_config(stage, release=True), make(lora))
    train(engine, rank)
    for given in (call(rank), call(rank, num_beams=3), _right_padded(rank)):
        _growth(engine, given)  # a first use may leave what is not inference: constants
        grown = _growth(engine, given)
        assert max(grown) <= _ROUND, grown
    train(engine, rank)
    grown = _growth(engine, call(rank))
    assert max(grown) <= _ROUND, grown
    whole = sum(tensor.numel() for tensor in make(lora).parameters()) * 4
    with without_collector():
        before = live_bytes()
        with pytest.raises((LookupError, RankError)) as held:
            engine.generate(**call(rank, logits_processor=[_odd]))
        assert live_bytes() - before < whole / 4
        held.value.__traceback__ = held.value.__context__ = None
        del held
        assert live_bytes() <= before + _ROUND


def _odd(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if ids.shape[1] > 7:
        raise LookupError("a processor fails")
    return scores


def kept_memory_is_seen(rank: int, stage: int) -> None:
    """The control of the claim above."""
    engine = start(_config(stage, release=False), make(False))
    generated, training = _growth(engine, call(rank))
    report = engine.explain()
    assert generated >= training >= report.prepared_bytes + report.kv_bytes > 0


def shared_stacks_change_nothing(rank: int, stage: int, *, bf16: bool) -> None:
    """Tokens and weights are those without; what DeepSpeed lays out itself is copied, and said."""
    found = []
    for share in (False, True):
        dtype = torch.bfloat16 if bf16 else torch.float32
        options = {"share_storage": share}
        engine = start(ds_config(stage, bf16=bf16, hybrid_fx=options), make(False, dtype))
        said = []
        for step in range(3):
            engine.eval()
            said.append(engine.generate(**call(rank)).tolist())
            train(engine, rank, step)
        engine.eval()
        said.append(engine.generate(**call(rank)).tolist())
        report = engine.explain()
        found.append((said, weights(engine)))
        assert (report.shared_bytes > 0) == (share and stage == 0)
        reasons = " ".join({copy.reason for copy in report.copies})
        expected = ("", "is a view of", "is a view of", "weights are sharded")[stage]
        assert not share or expected in reasons, reasons
    (plain, held), (shared, trained) = found
    assert shared == plain
    assert all(torch.equal(trained[name], held[name]) for name in held)
