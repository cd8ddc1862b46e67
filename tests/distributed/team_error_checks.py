"""Claims about what goes wrong in a team, checked on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from engines import call, make, no_room, plain, train, weights
from teams import same, started
from torch import Tensor

from hybrid_fx.errors import InputError, RankError


def other_options_in_a_team_are_refused_by_name(rank: int, stage: int) -> None:
    engine = started(stage)
    first = call(rank)
    same(engine, first)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"do_sample": bool(rank)}, "do_sample is False on rank 0 and True on rank 1"),
        ({"repetition_penalty": 1.0 + rank}, "repetition_penalty"),
        ({"num_beams": 1 + rank}, "num_beams"),
        ({"logits_processor": [_Odd()] * rank}, "logits_processor is  on rank 0 and _Odd"),
    ]
    for changes, said in cases:
        with pytest.raises(InputError, match=said):
            engine.generate(**call(rank, **changes))
    same(engine, first)


class _Odd:
    """A processor that fails after some steps."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.steps -= 1
        if self.steps < 0:
            raise LookupError("a processor fails")
        return scores


class _Quiet(_Odd):
    """One that does not fail."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def an_error_on_one_rank_is_one_of_its_team(rank: int, stage: int) -> None:
    """In the arguments, in a processor, and while weights are prepared."""
    engine = started(stage)
    same(engine, call(rank))
    bad = call(rank)
    if rank:
        bad["input_ids"] = bad["input_ids"] + 1000
    with pytest.raises(InputError if rank else RankError, match="" if rank else "rank 1"):
        engine.generate(**bad)
    same(engine, call(rank))
    _Quiet.__qualname__ = _Odd.__qualname__
    for steps in (0, 3):
        given = call(rank, logits_processor=[_Odd(steps) if rank else _Quiet()])
        with pytest.raises(LookupError if rank else RankError, match="fails" if rank else "rank 1"):
            engine.generate(**given)
        same(engine, call(rank))
    train(engine, rank)
    told = pytest.raises(MemoryError if rank else RankError, match="room" if rank else "rank 1")
    with no_room(engine) if rank else nullcontext(), told:
        engine.generate(**call(rank))
    same(engine, call(rank))


def a_rank_that_fails_within_a_forward_is_noticed(rank: int) -> None:
    """Nobody waits for it longer than a minute."""
    import time

    engine = started(0)
    engine.generate(**call(rank))
    reduce, calls = engine._source.group.all_reduce, []

    def failing(x: Tensor) -> Tensor:
        calls.append(x)
        if rank and len(calls) == 6:
            raise MemoryError("no room")
        found: Tensor = reduce(x)
        return found

    engine._source.group.all_reduce = failing
    begun = time.monotonic()
    with pytest.raises(MemoryError if rank else RankError, match="room" if rank else "gone"):
        engine.generate(**call(rank))
    assert time.monotonic() - begun < 60


def an_error_in_one_team(rank: int, stage: int) -> None:
    """Whole weights: the other team goes on. Sharded ones are everybody's: all ranks stop."""
    engine = started(stage)
    reference = plain(weights(engine), False)
    same(engine, call(rank), reference)
    given = call(rank)
    if rank == 1:
        given["input_ids"] = given["input_ids"] + 1000
    if rank < 2 or stage == 3:
        kind = InputError if rank == 1 else RankError
        with pytest.raises(kind, match="vocabulary" if rank == 1 else "rank 1 raised"):
            engine.generate(**given)
    else:
        same(engine, given, reference)
    changes = {"temperature": 0.5 + 0.1 * rank, "do_sample": True} if rank < 2 else {}
    if rank < 2:
        with pytest.raises(InputError, match=r"temperature is 0\.5 on rank 0 and 0\.6"):
            engine.generate(**call(rank, **changes))
    elif stage == 3:
        with pytest.raises(RankError, match="raised"):
            engine.generate(**call(rank))
    else:
        same(engine, call(rank), reference)
    same(engine, call(rank), reference)


def different_models_are_refused(rank: int, stage: int) -> None:
    engine = started(stage, make(True))
    if rank:
        engine.module.base_model.disable_adapter_layers()
    with pytest.raises(RankError, match="models differ"):
        engine.generate(**call(rank))


def what_is_not_captured_generates_all_the_same(rank: int, stage: int) -> None:
    engine = started(stage)

    def odd(module: Any, args: Any, output: Any) -> Any:
        return output * (1.0 if float(output.sum()) == float(output.sum()) else 2.0)

    engine.module.model.layers[0].mlp.register_forward_hook(odd)
    same(engine, call(rank))
    assert "not captured" in str(engine.stats.fallbacks)
