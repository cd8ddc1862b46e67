"""Claims about checkpoints of an engine that also generates, checked on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import call, ds_config, make, start, train, weights
from zero_checks import is_hf

#: ZeRO-3 puts the weights of a model file together only where it is asked to.
_GATHERS = {"stage3_gather_16bit_weights_on_model_save": True}

#: What each mode has done since the last step.
MODES: dict[str, Callable[[Any, int], object]] = {
    "training": lambda engine, rank: engine.train(),
    "generating": lambda engine, rank: engine.eval(),
    "after a generate": lambda engine, rank: engine.generate(**call(rank)),
    "training after a generate": lambda engine, rank: (
        engine.generate(**call(rank)),
        engine.train(),
    ),
}


def _config(stage: int, **changes: Any) -> dict[str, Any]:
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return ds_config(stage, zero={**zero, **(_GATHERS if stage == 3 else {})}, **changes)


def _differs(one: Any, other: Any, where: str = "") -> str:
    """Where two values of a checkpoint differ; "" where nowhere. The config's text may."""
    if type(one) is not type(other):
        return f"{where}: {type(one)} and {type(other)}"
    if isinstance(one, torch.Tensor):
        return "" if one.dtype == other.dtype and torch.equal(one, other) else where
    if isinstance(one, Mapping):
        one, other = ({k: v for k, v in d.items() if k != "ds_config"} for d in (one, other))
        if list(one) != list(other):
            return f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"
        found = (_differs(one[key], other[key], f"{where}.{key}") for key in one)
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} entries"
        found = (
            _differs(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))
        )
    elif hasattr(one, "__dict__") and not callable(one):
        return _differs(vars(one), vars(other), f"{where}.{type(one).__name__}")
    else:
        return "" if one == other or callable(one) else f"{where}: {one} and {other}"
    return next(filter(None, found), "")


def _saved(folder: Path) -> dict[str, Any]:
    """All that is in the files below ``folder``."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".pt", ".bin")]
    return {str(path.relative_to(folder)): torch.load(path, weights_only=False) for path in files}


def _save(engine: Any, folder: Path) -> Any:
    engine.save_checkpoint(str(folder), tag="saved")
    engine.save_16bit_model(str(folder), "model.bin")
    torch.distributed.barrier()
    return _saved(folder)


def nothing_of_inference_is_saved(rank: int, stage: int, lora: bool | str, folder: Path) -> None:
    """In each mode, the very files of an engine that never generated."""
    import deepspeed

    config = _config(stage)
    plain = deepspeed.initialize(
        model=make(lora), config={**config, "hybrid_engine": {"enabled": False}}
    )[0]
    train(plain, rank)
    wanted = _save(plain, folder / "plain")
    assert len(wanted) >= 2
    assert set(wanted["model.bin"]) == set(make(lora).state_dict())
    engine = start(config, make(lora))
    engine.generate(**call(rank))
    train(engine, rank)
    for mode, enter in MODES.items():
        enter(engine, rank)
        saved = _save(engine, folder / mode)
        assert list(saved) == list(wanted)
        assert not _differs(saved, wanted), (mode, _differs(saved, wanted))
        assert not _differs(engine.module_state_dict(), plain.module_state_dict())
        is_hf(engine, rank, lora, False)
    train(engine, rank)
    assert _differs(_save(engine, folder / "later"), wanted)


def a_checkpoint_is_loaded_in_any_mode(rank: int, stage: int, folder: Path, **changes: Any) -> None:
    """Tokens are those of the loaded weights, and training goes on as DeepSpeed's alone."""
    import deepspeed

    config = _config(stage, **changes)
    writer = start(config, make(False))
    for seed in range(2):
        train(writer, rank, seed)
    writer.generate(**call(rank))
    writer.save_checkpoint(str(folder), tag="two steps")
    held = weights(writer)
    plain = deepspeed.initialize(
        model=make(False), config={**config, "hybrid_engine": {"enabled": False}}
    )[0]
    assert plain.load_checkpoint(str(folder), tag="two steps")[0] is not None
    expected = train(plain, rank, 7)
    engine = start(config, make(False))
    for turn, enter in enumerate(MODES.values()):
        enter(engine, rank)
        version = engine.weight_version
        assert engine.load_checkpoint(str(folder), tag="two steps")[0] is not None
        assert engine.weight_version == version + 1
        assert all(torch.equal(tensor, held[name]) for name, tensor in weights(engine).items())
        is_hf(engine, rank, False, config["bf16"]["enabled"])
        if turn % 2:
            assert torch.equal(train(engine, rank, 7), expected)
    assert engine.stats.counters["prepares"] >= len(MODES)


def write(rank: int, stage: int, folder: Path) -> None:
    """Train, generate and save; the whole weights beside it."""
    engine = start(_config(stage), make(False))
    train(engine, rank)
    engine.generate(**call(rank))
    engine.save_checkpoint(str(folder / str(stage)), tag="saved")
    held = weights(engine)
    if rank == 0:
        torch.save(held, folder / f"{stage}.whole")
    torch.distributed.barrier()


def it_is_loaded_elsewhere(
    rank: int, source: int, target: int, folder: Path, **options: Any
) -> None:
    """On another stage or number of ranks, where DeepSpeed loads it."""
    engine = start(_config(target), make(False))
    engine.generate(**call(rank))
    path, _ = engine.load_checkpoint(str(folder / str(source)), tag="saved", **options)
    assert path is not None
    held = torch.load(folder / f"{source}.whole")
    assert all(torch.equal(tensor, held[name]) for name, tensor in weights(engine).items())
    is_hf(engine, rank, False, False)
    train(engine, rank)
    is_hf(engine, rank, False, False)


def a_load_that_deepspeed_refuses_leaves_an_engine_that_generates(
    rank: int, source: int, target: int, folder: Path, **options: Any
) -> None:
    """Some refusals come after the weights were replaced: what stands there is generated from."""
    engine = start(_config(target), make(False))
    engine.generate(**call(rank))
    with pytest.raises(Exception):  # noqa: B017 - DeepSpeed's own, of any kind
        engine.load_checkpoint(str(folder / str(source)), tag="saved", **options)
    is_hf(engine, rank, False, False)


def weights_put_together_from_shards_are_generated_from(
    rank: int, source: int, target: int, folder: Path
) -> None:
    """By DeepSpeed's zero_to_fp32, into an engine of any stage."""
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(folder / str(source)), tag="saved")
    held = torch.load(folder / f"{source}.whole")
    engine = start(_config(target), make(False))
    engine.generate(**call(rank))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        if rank == 0 or target < 3:
            engine.module.load_state_dict(state)
    assert all(torch.equal(tensor, held[name]) for name, tensor in weights(engine).items())
    is_hf(engine, rank, False, False)
