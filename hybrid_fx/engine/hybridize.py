"""The front door: ``engine = hybrid_fx.hybridize(model)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..compat.placement import device_of
from ..compat.wrappers import is_language_model, wrapped
from ..config import HybridConfig, make_config
from ..errors import ConfigError, InputError
from ..plan.choice import optional_passes, policies
from ..runtime.recording import check_records
from .engine import HybridEngine
from .switch import engine_of


def check_generates(model: object) -> nn.Module:
    """Refuse what cannot generate.

    Raises:
        InputError: saying what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"hybridize got a {type(model).__name__}; pass the model itself, a transformers causal "
            "language model or a PeftModel around one"
        )
    name = type(model).__name__
    if (held := wrapped(model)) is not None:
        path, inner = held
        raise InputError(
            f"{name} is a wrapper around a {type(inner).__name__}; pass what it holds, model{path}:"
            " its generate goes through the engine then, also where the wrapper calls it; train "
            "the wrapper as before"
        )
    if not is_language_model(model):
        base: Any = getattr(model, "get_base_model", lambda: model)()
        raise InputError(
            f"{type(base).__name__} does not generate; pass a model with a language-modeling head, "
            "e.g. one from AutoModelForCausalLM"
        )
    if next(iter(model.parameters()), None) is None:
        raise InputError(f"{name} has no parameters; load its weights first")
    return model


def hybridize(
    model: nn.Module,
    config: HybridConfig | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> HybridEngine:
    """Let one model train as it is and generate from rewritten graphs.

    Nothing is captured yet: the first generate (or ``explain()``) does that. ``model.generate``
    goes through the engine from now on, until :meth:`HybridEngine.close`.

    Args:
        model: A transformers causal language model, or a PeftModel around one.
        config: A :class:`HybridConfig`, or a mapping of its fields.
        **overrides: Single fields, over ``config``.

    Returns:
        The engine; for a model that has one already and no other options, that one.

    Raises:
        InputError: where ``model`` is no module or cannot generate.
        ConfigError: for an unknown option, passes or policies that do not fit together, graphs
            that the model's device does not have, or where the model has an engine with other
            options.
    """
    checked = check_generates(model)
    options = make_config(config, overrides)
    present = engine_of(checked)
    if present is None:
        for choose in (optional_passes, policies):
            choose(options)  # what does not fit is refused before anything is touched
        check_records(options.graph, device_of(checked))
        return HybridEngine(checked, options)
    if options != present.config and (config is not None or overrides):
        raise ConfigError(
            f"this model is hybridized already, with {present.config}; close() that engine to "
            "choose other options"
        )
    return present
