"""Engines of ranks that generate together, for the checks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from engines import ds_config, make, plain, start, weights
from torch import Tensor

from hybrid_fx.capture import plain_linear


def team_config(stage: int, **block: Any) -> dict[str, Any]:
    """A config in which two ranks generate together; ``block`` are further fields of its block."""
    config = ds_config(stage)
    config["hybrid_engine"] |= {"inference_tp_size": 2, **block}
    return config


def started(stage: int, model: Any = None) -> Any:
    """An engine of two ranks that generate together, or as :func:`under` says."""
    block = json.loads(os.environ.get(_BLOCK, "{}"))
    return start(team_config(stage, **block), make(False) if model is None else model)


_BLOCK = "BLOCK_OF_THESE_CHECKS"


def under(rank: int, check: Callable[[int], None], **block: Any) -> None:
    """``check`` with these fields of the ``hybrid_engine`` block."""
    os.environ[_BLOCK] = json.dumps(block)
    try:
        check(rank)
    finally:
        del os.environ[_BLOCK]


def same(engine: Any, given: dict[str, Any], reference: Any = None) -> Tensor:
    """Tokens are those of transformers for these rows alone; returns them."""
    reference = plain(weights(engine), False) if reference is None else reference
    with plain_linear():
        expected = reference.generate(**given)
    found = engine.generate(**given)
    assert torch.equal(found, expected), (found, expected)
    return found
