"""Embeddings in place of token ids: do the graphs take them as the module does?

Where the module's forward takes ``inputs_embeds`` differs from model to model (before or behind a
scale, say). The first embeddings of a runner are held against the module itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.closeness import TOLERANCE, distance_of
from .protocol import Runner

#: Columns that are compared.
_COLUMNS = 4


def embeds_fault(causal: Any, runner: Runner, embeds: Tensor) -> str | None:
    """Why a session cannot be given ``embeds`` ``[B, T, E]``, or None."""
    if runner.takes_embeds is None:
        runner.takes_embeds = _agree(causal, runner, embeds[:1, :_COLUMNS])
    return None if runner.takes_embeds else "inputs_embeds, which its graphs do not take"


def _agree(causal: Any, runner: Runner, embeds: Tensor) -> bool:
    """Whether graphs and module give the same logits, relative Euclidean distance."""
    ids = embeds.new_zeros(embeds.shape[:2], dtype=torch.int64)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    plain = type(causal).forward
    wanted = plain(causal, inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
    session = runner.session(batch=1, capacity=ids.shape[1])
    try:
        got = session.forward(ids, positions, keep=ids.shape[1], embeds=embeds)
    finally:
        session.close()
    return distance_of(got, wanted) <= TOLERANCE.get(wanted.dtype, 1e-1)
