"""The seam to DeepSpeed: everything this package knows of its insides. Tried on 0.19.8.

Read, and nothing else: ``ds_shape``, ``ds_tensor`` (this rank's shard) and ``ds_process_group`` of
ZeRO-3 parameters, the settings in an engine's config, and which hooks and attributes on the
modules are DeepSpeed's. Hooks, prefetching and status flags are never touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import HybridEngineConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine as _OwnHybridEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from torch import Tensor, nn

from ..cache.tree import View
from .shards import Shard

__all__ = ["DeepSpeedEngine"]

# What ZeRO-3 leaves on modules beside names that begin with ds_.
_ATTRIBUTES = frozenset(
    "_external_params all_parameters _original_parameters pre_bwd_fn post_bwd_fn "
    "applied_pre_backward_ref_cnt".split()
)


class DeepSpeedView(View):
    """A model inside an engine: without DeepSpeed's hooks, and whole where ZeRO-3 sharded it."""

    def foreign_attribute(self, name: str) -> bool:
        """Whether DeepSpeed left the attribute ``name`` on modules."""
        return name.startswith("ds_") or name in _ATTRIBUTES

    def foreign_hook(self, hook: Any) -> bool:
        """Whether ``hook`` is a function of DeepSpeed."""
        return str(getattr(hook, "__module__", None)).partition(".")[0] == "deepspeed"

    def shape(self, tensor: Tensor) -> torch.Size:
        """The shape of the whole parameter."""
        whole: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
        return whole

    def held(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """A sharded parameter comes and goes; its shard stays."""
        if is_sharded(tensor):
            return f"{name}.ds_tensor", tensor.ds_tensor  # type: ignore[attr-defined]
        return name, tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a parameter that ZeRO-3 took apart."""
    return hasattr(tensor, "ds_tensor")


def shard_of(parameter: Tensor, layer: str = "") -> Shard:
    """This rank's part of a sharded parameter, which belongs to ``layer``."""
    held: Any = parameter
    return Shard(
        part=held.ds_tensor,
        shape=held.ds_shape,
        device=held.device,
        group=held.ds_process_group,
        layer=layer,
    )


def read_config(config: Any) -> Mapping[str, Any]:
    """The DeepSpeed config behind a mapping, a path or its base64 text, by DeepSpeed's reader."""
    found: Mapping[str, Any] = load_ds_config(config)
    return found


def config_of(engine: Any) -> Mapping[str, Any]:
    """The config that an engine was made with."""
    found: Mapping[str, Any] = engine._config._param_dict
    return found


def say_enabled(engine: Any, block: Mapping[str, Any]) -> None:
    """Let the engine's config show the ``hybrid_engine`` block that the user gave."""
    engine._config.hybrid_engine = HybridEngineConfig(**block)


def stage_of(engine: Any) -> int:
    """The ZeRO stage."""
    return int(engine.zero_optimization_stage())


def plain_initialize(**arguments: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``."""
    made: tuple[Any, Any, Any, Any] = deepspeed.initialize(**arguments)
    return made


@contextmanager
def without_builds() -> Iterator[None]:
    """Let an initialize build no shared-memory collectives: gloo serves, without a compiler.

    DeepSpeed would build them at the first initialize on a CPU, which takes minutes. Its own
    variable ``DS_BUILD_SHM_COMM=1`` asks for them.
    """
    name, compatible = "deepspeed_shm_comm", deepspeed.ops.__compatible_ops__
    if os.environ.get("DS_BUILD_SHM_COMM", "0") != "0" or not compatible.get(name, False):
        yield
        return
    before, compatible[name] = compatible[name], False
    try:
        yield
    finally:
        compatible[name] = before


def kind_of_engine(engine: object) -> str:
    """``"engine"`` for one that can be taken over; else what it is, for an error."""
    if isinstance(engine, PipelineEngine):
        return "a pipeline engine"
    if isinstance(engine, _OwnHybridEngine):
        return "DeepSpeed's own hybrid engine"
    return "engine" if isinstance(engine, DeepSpeedEngine) else "no DeepSpeedEngine"


def is_pipeline(model: object) -> bool:
    """Whether ``model`` is cut into pipeline stages."""
    return isinstance(model, PipelineModule)


def has_experts(model: nn.Module) -> bool:
    """Whether ``model`` holds DeepSpeed's mixture-of-experts layers."""
    return any(type(module).__module__.startswith("deepspeed.moe") for module in model.modules())


def sliced_part(model: nn.Module) -> str:
    """A module or weight of which each rank has a slice, for an error; "" where there is none."""
    for path, module in model.named_modules():
        if type(module).__module__ == "deepspeed.module_inject.layers":
            return f"{path}, a {type(module).__name__} of AutoTP"
    for name, parameter in model.named_parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            return f"{name}, marked tensor_model_parallel"
    return ""


def free_gathered(engine: Any) -> None:
    """Free the parameters that ZeRO-3 keeps gathered from one call to the next."""
    engine.empty_partition_cache()


def accelerator_device() -> torch.device:
    """Where DeepSpeed puts models."""
    return torch.device(get_accelerator().device_name())


def share_rng_state(source: int = 0, group: Any = None) -> None:
    """Give the ranks of ``group`` the random state of rank ``source``, on its accelerator.

    Collective.

    Args:
        source: A number in the whole job.
        group: The process group; ``None`` is that of all ranks.
    """
    accelerator = get_accelerator()
    state = accelerator.get_rng_state().to(accelerator.current_device_name())
    deepspeed.comm.broadcast(state, source, group)
    accelerator.set_rng_state(state.cpu())
