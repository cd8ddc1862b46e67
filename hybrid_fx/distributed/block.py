"""The ``"hybrid_engine"`` block of a DeepSpeed config, verbatim, and our options beside it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..config import HybridConfig, make_config
from ..errors import ConfigError
from .random_states import without_choice

#: The name of the block with fields of :class:`~hybrid_fx.config.HybridConfig`, beside DeepSpeed's.
OPTIONS = "hybrid_fx"

_COUNTS = ("max_out_tokens", "inference_tp_size", "tp_gather_partition_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridBlock:
    """DeepSpeed's own fields, with its defaults.

    Attributes:
        enabled: Without it, ``initialize`` is DeepSpeed's.
        max_out_tokens: Positions to reserve per row at least; never a cap.
        inference_tp_size: Ranks that generate together, each with a slice of the weights:
            consecutive ones, or those of the mpu's group. It divides the number of ranks.
        release_inference_cache: Free the KV workspace and the prepared weights after every
            generate.
        pin_parameters: Under ZeRO-3, gather all parameters at once, before generating. Without it
            each layer gathers its own while it runs, and frees them: two layers at once at most,
            beside what stands outside of layers. No effect under other stages.
        tp_gather_partition_size: Layers that one gather makes whole at most, where
            ``inference_tp_size`` is above 1 under ZeRO-3. Without effect elsewhere.
        enable_cuda_graph: The option ``graph="cudagraphs"``, where the options name no other.

    Raises:
        ConfigError: for a value of another kind.
    """

    enabled: bool = False
    max_out_tokens: int = 512
    inference_tp_size: int = 1
    release_inference_cache: bool = False
    pin_parameters: bool = True
    tp_gather_partition_size: int = 8
    enable_cuda_graph: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _COUNTS:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ConfigError(f"hybrid_engine.{field.name}={value!r} must be 1 or more")
            elif not isinstance(value, bool):
                raise ConfigError(f"hybrid_engine.{field.name}={value!r} must be true or false")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> HybridBlock:
        """Read the block of a whole DeepSpeed config; a missing one is not enabled.

        Raises:
            ConfigError: for an unknown field (the nearest known one is named) or a bad value.
        """
        block = config.get("hybrid_engine") or {}
        if not isinstance(block, Mapping):
            raise ConfigError(f"hybrid_engine is a {type(block).__name__}; it must be an object")
        known = [field.name for field in fields(cls)]
        for name in block:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"unknown field hybrid_engine.{name}; did you mean {near!r}? "
                    f"Known: {', '.join(known)}"
                )
        return cls(**block)


def options_of(config: Mapping[str, Any], block: HybridBlock) -> HybridConfig:
    """The engine's options: those of the ``"hybrid_fx"`` block, over what DeepSpeed's block says.

    ``sync_rng`` may stand there as well, and is none of them.

    Raises:
        ConfigError: for an unknown option or a bad value.
    """
    own = config.get(OPTIONS) or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"{OPTIONS} is a {type(own).__name__}; it must be an object of options")
    said = {
        "max_out_tokens": block.max_out_tokens,
        "release_inference_cache": block.release_inference_cache,
        "graph": "cudagraphs" if block.enable_cuda_graph else "eager",
    }
    return make_config(None, {**said, **without_choice(own)})
