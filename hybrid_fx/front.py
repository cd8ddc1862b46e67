"""The front door for any model or engine: ``engine = hybrid_fx.hybridize(...)``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from .config import HybridConfig
from .distributed.initialize import take_over
from .distributed.random_states import refuse_choice
from .engine.engine import HybridEngine
from .engine.hybridize import hybridize as hybridize_model
from .errors import InputError


def hybridize(
    model: Any,
    config: HybridConfig | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> HybridEngine:
    """Let one model train as it is and generate from rewritten graphs.

    Nothing is captured yet: the first generate (or ``explain()``) does that. ``model.generate``
    goes through the engine from now on, until :meth:`HybridEngine.close`.

    Args:
        model: A transformers causal language model, a PeftModel around one, or an initialised
            ``DeepSpeedEngine`` of one, which is then returned itself (see
            :func:`hybrid_fx.initialize`).
        config: A :class:`HybridConfig`, or a mapping of its fields.
        **overrides: Single fields, over ``config``. For a ``DeepSpeedEngine`` also ``sync_rng``,
            see :func:`hybrid_fx.initialize`; by default ``"group"``: data-parallel ranks keep
            their random states.

    Returns:
        The engine; for a model that has one already and no other options, that one.

    Raises:
        InputError: where ``model`` is no module or cannot generate.
        ConfigError: for an unknown option, for a feature of DeepSpeed that generating does not
            work with, or where the model has an engine with other options.
    """
    deepspeed: Any = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        engine: HybridEngine = take_over(model, config, overrides)
        return engine
    refuse_choice(config, overrides)
    if any(hasattr(parameter, "ds_tensor") for parameter in _parameters(model)):
        raise InputError(
            f"the weights of this {type(model).__name__} are sharded by ZeRO-3; pass the "
            "DeepSpeedEngine that trains it, or build it by hybrid_fx.initialize"
        )
    return hybridize_model(model, config, **overrides)


def _parameters(model: Any) -> list[Any]:
    return list(model.parameters()) if isinstance(model, torch.nn.Module) else []
