"""What of DeepSpeed generating does not work with: said by name, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import HybridConfig
from ..errors import ConfigError
from .block import HybridBlock


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an engine is made of, or will be.

    Attributes:
        config: The DeepSpeed config.
        block: Its ``hybrid_engine`` block.
        mpu: The model-parallel unit, or None.
        mesh: The device mesh's sizes, or None.
    """

    config: Mapping[str, Any]
    block: HybridBlock
    mpu: Any = None
    mesh: Any = None

    @property
    def zero(self) -> Mapping[str, Any]:
        """The ``zero_optimization`` block; ``true`` in its place means stage 1."""
        block = self.config.get("zero_optimization") or {}
        return block if isinstance(block, Mapping) else {"stage": 1}

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero.get("stage", 0))

    def at(self, *path: str) -> Any:
        """A value of the config by its keys, None where there is none."""
        value: Any = self.config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _sequence_degree(mpu: Any) -> int:
    ask = getattr(mpu, "get_sequence_parallel_world_size", None)
    return 1 if ask is None else int(ask())


def _sequence_parallel(setup: Setup) -> bool:
    mesh = setup.mesh if isinstance(setup.mesh, tuple | list) else ()
    return (
        _above_one(setup.at("sequence_parallel_size"))
        or any(_above_one(size) for size in mesh[1:])
        or _sequence_degree(setup.mpu) > 1
    )


def _zero_plus_plus(setup: Setup) -> bool:
    quantized = "weights nontrainable_weights gradients".split()
    return _above_one(setup.zero.get("zero_hpz_partition_size")) or any(
        setup.zero.get(f"zero_quantized_{what}") for what in quantized
    )


def _nvme(setup: Setup) -> bool:
    devices = (setup.at("zero_optimization", f"offload_{w}", "device") for w in _OFFLOADED)
    return any(str(device).lower() == "nvme" for device in devices)


_OFFLOADED = ("param", "optimizer")


#: (what is not supported, whether a setup has it, what to do instead)
RULES: tuple[tuple[str, Callable[[Setup], bool], str], ...] = (
    (
        "AutoTP, which slices the model to train it",
        lambda setup: _above_one(setup.at("tensor_parallel", "autotp_size")),
        "leave tensor_parallel out, and set hybrid_engine.inference_tp_size",
    ),
    ("sequence parallelism", _sequence_parallel, "set its size to 1"),
    (
        "offloading to NVMe",
        _nvme,
        'set "device": "cpu" in offload_param and offload_optimizer',
    ),
    ("ZeRO++ (hpZ, quantized weights or gradients)", _zero_plus_plus, "leave its settings out"),
    (
        "MiCS",
        lambda setup: (setup.zero.get("mics_shard_size") or 0) > 0,
        "leave mics_shard_size out",
    ),
    ("ZenFlow", lambda setup: bool(setup.zero.get("zenflow")), "leave zenflow out"),
    (
        "DeepCompile",
        lambda setup: bool(setup.at("compile", "deepcompile")),
        "set compile.deepcompile to false",
    ),
    (
        "AutoEP (expert parallelism)",
        lambda setup: bool(setup.at("expert_parallel", "enabled")),
        "set expert_parallel.enabled to false",
    ),
)


def refused(setup: Setup) -> Iterator[str]:
    """One line for each thing of ``setup`` that is not supported, with the remedy."""
    for what, has, remedy in RULES:
        if has(setup):
            yield f"{what}: {remedy}"


def check_setup(setup: Setup) -> None:
    """Refuse what is not supported, all of it in one message.

    Raises:
        ConfigError: naming each thing and its remedy. Nothing was changed.
    """
    if lines := list(refused(setup)):
        raise ConfigError(
            "hybrid_fx does not generate with " + "; nor with ".join(lines) + ". "
            'With "hybrid_engine": {"enabled": false} this trains as under deepspeed.initialize'
        )


def check_options(options: HybridConfig, setup: Setup) -> None:
    """Refuse options that would have no effect, or that the graphs of a setup do not take.

    Raises:
        ConfigError: naming the option, and the remedy.
    """
    if options.train_graph:
        raise ConfigError(
            "train_graph=True is not supported under DeepSpeed, whose own forward trains; leave "
            "it out"
        )
    if options.graph != "eager" and setup.block.inference_tp_size > 1:
        raise ConfigError(
            f"graph={options.graph!r} does not lower graphs with collectives in them; set "
            'graph="eager" (hybrid_engine.enable_cuda_graph to false), or '
            "hybrid_engine.inference_tp_size to 1"
        )
    if options.graph != "eager" and setup.stage == 3 and not setup.block.pin_parameters:
        raise ConfigError(
            f"graph={options.graph!r} does not lower layers that gather their own weights; set "
            'graph="eager" (hybrid_engine.enable_cuda_graph to false), or '
            "hybrid_engine.pin_parameters to true"
        )


def check_engine(kind: str) -> None:
    """Refuse engines of another kind than ``"engine"``.

    Raises:
        ConfigError: naming what it is, and the remedy.
    """
    if kind != "engine":
        raise ConfigError(
            f"hybrid_fx cannot take over {kind}; initialise the model by hybrid_fx.initialize, or "
            'by deepspeed.initialize with "hybrid_engine": {"enabled": false}'
        )


def check_model(model: nn.Module, *, pipeline: bool, experts: bool, sliced: str) -> None:
    """Refuse models that are spread over ranks by more than ZeRO.

    Args:
        pipeline: Whether it is cut into stages.
        experts: Whether its experts differ from rank to rank.
        sliced: A weight or module of which this rank has a slice, or "".

    Raises:
        ConfigError: naming what it is, and the remedy.
    """
    if pipeline:
        raise ConfigError(
            "hybrid_fx does not generate with a PipelineModule: no rank has all of its layers; "
            "pass the transformers model itself and use ZeRO"
        )
    if experts:
        raise ConfigError(
            f"hybrid_fx does not generate with DeepSpeed's MoE layers (in {type(model).__name__}): "
            "their experts differ from rank to rank; use the model's own experts and ZeRO"
        )
    if sliced:
        raise ConfigError(
            f"hybrid_fx does not generate with a model that is sliced already ({sliced}): its "
            "collectives are its own; pass the whole model and set hybrid_engine.inference_tp_size"
        )
