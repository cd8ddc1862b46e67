"""Claims about whose random numbers ranks draw, checked on every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import call, ds_config, hf_tokens, make, start, weights
from teams import team_config
from torch import Tensor

import hybrid_fx


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What is logged as a warning meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hybrid_fx")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def taken_over(config: dict[str, Any], **options: Any) -> Any:
    """The engine of ``hybridize(deepspeed engine)``."""
    import deepspeed

    config["hybrid_engine"] |= {"enabled": False}
    return hybrid_fx.hybridize(deepspeed.initialize(model=make(False), config=config)[0], **options)


def initialised(config: dict[str, Any], **options: Any) -> Any:
    """The engine of ``initialize``."""
    return start({**config, "hybrid_fx": options}, make(False))


def alike(mine: Tensor) -> bool:
    """Whether all ranks hold this."""
    held = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(held, mine)
    return all(torch.equal(other, mine) for other in held)


def samples(engine: Any) -> Tensor:
    """Completions of a prompt that all ranks are given; those of transformers under the state."""
    given = {**call(0, do_sample=True, max_new_tokens=8), "min_new_tokens": 8}
    state = torch.get_rng_state()
    found: Tensor = engine.generate(**given)
    left = torch.get_rng_state()
    held = weights(engine)
    torch.set_rng_state(state)
    assert torch.equal(hf_tokens(held, False, given), found)
    assert torch.equal(torch.get_rng_state(), left)
    return found


def _keeps_its_own(engine: Any, state: Tensor, said: list[str]) -> None:
    assert torch.equal(torch.get_rng_state(), state)
    assert not said
    assert not alike(samples(engine))


def _is_shared(engine: Any, who: str, rank: int, said: list[str]) -> None:
    assert len(said) == (rank == 0)
    assert all(who in text and "equal prompts" in text and "none" in text for text in said)
    assert alike(torch.get_rng_state())
    assert alike(samples(engine))


def data_parallel_ranks_keep_their_states(rank: int, stage: int) -> None:
    """Each rank was seeded apart, as ``set_seed(device_specific=True)`` does."""
    ways = (
        (taken_over, {}),
        (initialised, {"sync_rng": "none"}),
        (initialised, {"sync_rng": "group"}),
    )
    for make_engine, options in ways:
        torch.manual_seed(rank)
        state = torch.get_rng_state()
        with warnings() as said:
            engine = make_engine(ds_config(stage), **options)
        _keeps_its_own(engine, state, said)
        assert hybrid_fx.hybridize(engine) is engine


def all_ranks_share_a_state_where_it_is_asked_for(rank: int, stage: int) -> None:
    ways = (
        (initialised, {}),
        (initialised, {"sync_rng": "all"}),
        (taken_over, {"sync_rng": "all"}),
    )
    for make_engine, options in ways[stage > 0 :]:
        torch.manual_seed(rank)
        with warnings() as said:
            engine = make_engine(ds_config(stage), **options)
        _is_shared(engine, "all 2 ranks", rank, said)


def ranks_of_a_team_share_a_state_or_keep_their_own(rank: int, stage: int) -> None:
    """A forward of a team needs no equal states."""
    torch.manual_seed(rank)
    with warnings() as said:
        engine = taken_over(team_config(stage))
    _is_shared(engine, "2 ranks of each team", rank, said)
    torch.manual_seed(rank)
    state = torch.get_rng_state()
    with warnings() as said:
        engine = taken_over(team_config(stage), sync_rng="none")
    _keeps_its_own(engine, state, said)


def a_team_shares_no_state_with_another(rank: int) -> None:
    """Of four ranks in two teams."""
    torch.manual_seed(rank)
    taken_over(team_config(0))
    state = torch.get_rng_state()
    held = [torch.empty_like(state) for _ in range(4)]
    dist.all_gather(held, state)
    assert [torch.equal(held[0], other) for other in held] == [True, True, False, False]
    assert torch.equal(held[2], held[3])


def another_choice_needs_another_engine(rank: int) -> None:
    engine = taken_over(ds_config(0))
    for options in ({"sync_rng": "all"}, {"config": {"sync_rng": "none"}}):
        with pytest.raises(hybrid_fx.ConfigError, match=r"hybridized already.*sync_rng='group'"):
            hybrid_fx.hybridize(engine, **options)
    assert hybrid_fx.hybridize(engine, sync_rng="group") is engine
    engine.close()
    assert not hasattr(engine, "_sync_rng")
