"""The runner of a plan, as a configuration and a model want it."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..compat.placement import device_of
from ..config import HybridConfig
from ..generate import causal_lm, position_limit
from ..passes.packing import Forms
from ..plan.plan import Plan
from ..runtime import PlanRunner
from ..runtime.forms import measured_forms
from ..runtime.lowering import by_inductor
from ..runtime.recording import Recorder, Recording, Step, recorder_of
from ..runtime.shared_rows import SharedRows
from .plans import cache_directory
from .source import Source
from .stats import Stats

logger = logging.getLogger("hybrid_fx")


def limit_of(model: nn.Module) -> int | None:
    """The maximum positions of a model."""
    return position_limit(causal_lm(model).config)


class _Counted:
    """A recorder whose recordings, and the time they take, are counted."""

    def __init__(self, recorder: Recorder, stats: Stats) -> None:
        self._recorder, self._stats = recorder, stats
        self.release = recorder.release

    def record(self, step: Step) -> Recording:
        with self._stats.timer("record"):
            made = self._recorder.record(step)
        self._stats.count("recordings")
        return made


def _recorder(config: HybridConfig, device: torch.device, stats: Stats) -> Recorder | None:
    """A recorder for one runner, where steps are to be recorded and can be."""
    if config.graph != "cudagraphs":
        return None
    made = recorder_of(device)
    if made is None:
        logger.warning("the model is on %s, so decode steps are not recorded", device)
        return None
    return _Counted(made, stats)


def forms_of(plan: Plan, device: torch.device, config: HybridConfig) -> Forms:
    """What a config lets a plan pack on a device, and how."""
    return measured_forms(
        device,
        sorted({getattr(torch, t.dtype) for t in plan.manifest.prepared if t.packed}, key=str),
        same_dtype=config.pack_dtype == "same",
        directory=cache_directory(config),
    )


def make_runner(
    plan: Plan,
    source: Source,
    config: HybridConfig,
    stats: Stats,
    *,
    rows: SharedRows | None,
    measures: bool,
) -> PlanRunner:
    """A runner of ``plan``, nothing prepared yet.

    Args:
        rows: Where weights that are stacked lie in one buffer.
        measures: Whether folds measure what rounding takes.
    """
    device = device_of(source.model)
    return PlanRunner(
        plan,
        device=device,
        lower=by_inductor if config.graph == "inductor" else None,
        limit=limit_of(source.model),
        max_out_tokens=config.max_out_tokens,
        timer=stats.timer,
        group=source.group,
        gather=source.gather,
        stream=source.stream,
        rows=rows,
        measures=measures,
        recorder=_recorder(config, device, stats),
        forms=forms_of(plan, device, config),
    )
