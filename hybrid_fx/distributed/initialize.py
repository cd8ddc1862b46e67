"""The front door of DeepSpeed users: ``hybrid_fx.initialize`` for ``deepspeed.initialize``.

Nothing of DeepSpeed is imported before it is called.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ..config import HybridConfig, make_config
from ..errors import ConfigError, HybridError, InputError
from .block import OPTIONS, HybridBlock, options_of
from .random_states import choice_among, without_choice
from .refusals import Setup, check_engine, check_model, check_options, check_setup
from .team import check_degree, world_size


def _need_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise HybridError(
            "hybrid_fx.initialize needs DeepSpeed, which is not installed: "
            'pip install "hybrid_fx[deepspeed]", or use hybrid_fx.hybridize(model) without it'
        )


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Take the arguments of ``deepspeed.initialize`` and return what it returns.

    With ``"hybrid_engine": {"enabled": true, ...}`` in the config, the engine also generates from
    rewritten graphs, as one of :func:`hybrid_fx.hybridize` does: it is a ``DeepSpeedEngine`` and a
    :class:`~hybrid_fx.HybridEngine`. Otherwise this is ``deepspeed.initialize``. Fields of
    :class:`~hybrid_fx.config.HybridConfig` may stand in a block ``"hybrid_fx"`` beside it.

    There ``"sync_rng"`` says which ranks take over one random state when the engine is made:
    ``"all"`` (the default, as under DeepSpeed's hybrid engine) that of rank 0; ``"group"`` those
    that generate together (``inference_tp_size``) that of their first; ``"none"`` leaves each rank
    its own. Ranks with one state sample equal completions of equal prompts, which rank 0 warns of.

    Collective, as DeepSpeed's is.

    Returns:
        ``(engine, optimizer, training_dataloader, lr_scheduler)``.

    Raises:
        HybridError: where DeepSpeed is not installed.
        ConfigError: for an unknown field, a bad value, or a feature of DeepSpeed that generating
            does not work with, by name. Nothing was changed then.
        InputError: for a model that cannot generate. Nothing was changed then.
    """
    _need_deepspeed()
    from . import seam

    arguments = {
        "args": args,
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "distributed_port": distributed_port,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "config": config,
        "mesh_param": mesh_param,
        "config_params": config_params,
    }
    given = _given_config(args, config, config_params)
    if given is None or model is None:
        return seam.plain_initialize(**arguments)  # which says what is missing
    settings = seam.read_config(given)
    block = HybridBlock.of(settings)
    if not block.enabled:
        return seam.plain_initialize(**arguments)
    options = options_of(settings, block)
    sync_rng = choice_among(settings.get(OPTIONS), default="all")
    setup = Setup(config=settings, block=block, mpu=mpu, mesh=mesh_param)
    check_options(options, setup)
    _check_records(options)
    check_setup(setup)
    check_degree(block.inference_tp_size, mpu, world_size())
    _check_whole(model, pipeline=seam.is_pipeline(model))
    _check_generates(model)
    # DeepSpeed would build a hybrid engine of its own.
    plain = {name: value for name, value in settings.items() if name != OPTIONS}
    plain["hybrid_engine"] = {**settings["hybrid_engine"], "enabled": False}
    if getattr(args, "deepspeed_config", None) is not None:
        args = copy.copy(args)
        args.deepspeed_config = None
    arguments |= {"args": args, "config": copy.deepcopy(plain), "config_params": None}
    with seam.without_builds():
        engine, *others = seam.plain_initialize(**arguments)
    seam.say_enabled(engine, asdict(block))
    from .engine import attach

    return (attach(engine, options, block, sync_rng), *others)


def take_over(
    engine: Any, config: HybridConfig | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> Any:
    """``hybridize`` of an initialised DeepSpeedEngine, as :func:`initialize` would have made it.

    The block in the engine's own config counts, enabled or not; ``config`` and ``overrides`` are
    fields of :class:`~hybrid_fx.config.HybridConfig` over it, and ``sync_rng``, by default
    ``"group"``: ranks that train on other data keep their random states.

    Raises:
        ConfigError, InputError: as :func:`initialize`.
    """
    from . import seam
    from .engine import DeepSpeedHybridEngine, attach

    given = without_choice(config) if isinstance(config, Mapping) else config
    fields = without_choice(overrides)
    if isinstance(engine, DeepSpeedHybridEngine):
        asked = None if given is None and not fields else make_config(given, fields)
        sync_rng = choice_among(overrides, config, default=engine._sync_rng)
        if (asked is not None and asked != engine.options) or sync_rng != engine._sync_rng:
            raise ConfigError(
                f"this engine is hybridized already, with {engine.options} and "
                f"sync_rng={engine._sync_rng!r}; close() it to choose other options"
            )
        return engine
    check_engine(seam.kind_of_engine(engine))
    settings = seam.config_of(engine)
    block = HybridBlock.of(settings)
    options = make_config(options_of(settings, block) if given is None else given, fields)
    sync_rng = choice_among(overrides, config, settings.get(OPTIONS), default="group")
    setup = Setup(config=settings, block=block, mpu=engine.mpu)
    check_options(options, setup)
    _check_records(options)
    check_setup(setup)
    check_degree(block.inference_tp_size, engine.mpu, world_size())
    _check_whole(engine.module, pipeline=False)
    _check_generates(engine.module)
    return attach(engine, options, block, sync_rng)


def _given_config(args: Any, config: Any, config_params: Any) -> Any:
    """The config among the three places where DeepSpeed looks for it."""
    for found in (config, config_params, getattr(args, "deepspeed_config", None)):
        if found is not None:
            return found
    return None


def _check_records(options: HybridConfig) -> None:
    from ..runtime.recording import check_records
    from .seam import accelerator_device

    check_records(options.graph, accelerator_device())


def _check_whole(model: Any, *, pipeline: bool) -> None:
    from . import seam

    sliced = seam.sliced_part(model)
    check_model(model, pipeline=pipeline, experts=seam.has_experts(model), sliced=sliced)


def _check_generates(model: Any) -> None:
    from ..engine.hybridize import check_generates
    from ..engine.switch import engine_of

    check_generates(model)
    if engine_of(model) is not None:
        raise InputError(
            f"this {type(model).__name__} is hybridized already; close() that engine first, "
            "and pass the model here"
        )
