"""Hold a plan against transformers' ``generate``, where code of a user's takes part in a forward.

Such code may do something else for a token than for a prompt, for one row than for more, for padded
rows, or by what only ``generate`` passes to a forward; the graph is that of two whole rows.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.reach import atoms_of, own_roots
from ..cache.tree import View
from ..generate import causal_lm
from ..generate.forced import ends_of, forced_logits
from ..runtime import PlanRunner
from ..runtime.closeness import allowed_distance, distance_of

#: Columns that are prefilled, and those that are decoded one by one.
PROMPT, STEPS = 9, 8

# What tells how many rows and tokens there are.
_SIZES = frozenset("shape size len numel get_seq_length cache_position".split())

#: Left padding of the rows of each batch.
BATCHES = ((0, 3), (0,))


def differs_in_steps(
    runner: PlanRunner, model: nn.Module, weights: Mapping[str, Tensor], limit: int | None
) -> str:
    """What a prepared plan computes otherwise than ``model`` when it generates, or "".

    Args:
        weights: That the plan was prepared on and the model does not hold, by qualified name.
        limit: The model's maximum positions.
    """
    names_positions = "position_ids" in inspect.signature(causal_lm(model).forward).parameters
    for padding in BATCHES if (limit or PROMPT) >= PROMPT else BATCHES[1:]:
        rows = [padded if names_positions else 0 for padded in padding]
        if difference := _differs(runner, model, weights, limit, rows):
            return difference
    return ""


def _differs(
    runner: PlanRunner,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    limit: int | None,
    padding: list[int],
) -> str:
    length = min(PROMPT + STEPS, limit or PROMPT + STEPS)
    first = max(1, length - STEPS)
    ids = _ids(runner.plan.manifest.vocab_size, len(padding), length, ends_of(model))
    ids, mask = ids.to(runner.device), torch.ones_like(ids).to(runner.device)
    for row, padded in enumerate(padding):
        mask[row, :padded] = 0
    with torch.no_grad():
        wanted = forced_logits(model, ids, mask, first, weights)
        got = _by_plan(runner, ids, mask, first)
    if got.shape != wanted.shape:
        return f"its logits are {list(got.shape)}, those of generate {list(wanted.shape)}"
    if not bool(wanted.isfinite().all()):
        return ""
    distance, allowed = distance_of(got, wanted), allowed_distance(runner.plan.manifest)
    if distance <= allowed:
        return ""
    return f"its logits differ from those of generate by {distance:.1e}, allowed {allowed:.0e}"


def _ids(vocabulary: int, rows: int, length: int, ends: list[int]) -> Tensor:
    rng = torch.Generator("cpu").manual_seed(0)
    tokens = torch.tensor(sorted({*range(vocabulary)} - {*ends}) or [0], device="cpu")
    return tokens[torch.randint(len(tokens), (rows, length), generator=rng, device="cpu")]


def _by_plan(runner: PlanRunner, ids: Tensor, mask: Tensor, first: int) -> Tensor:
    rows, length = ids.shape
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    valid = None if bool(mask.all()) else mask[:, :first].bool()
    session = runner.session(batch=rows, capacity=length, timer=_uncounted, recorded=False)
    try:
        parts = [session.forward(ids[:, :first], positions[:, :first], valid)]
        for at in range(first, length):
            parts.append(session.forward(ids[:, at : at + 1], positions[:, at : at + 1]))
    finally:
        session.close()
    return torch.cat(parts, 1)


def _uncounted(_: str) -> Any:
    """A span that nobody reads: these tokens are not the user's."""
    return nullcontext(SimpleNamespace(tokens=0))


def may_ask_for_sizes(model: nn.Module, view: View) -> bool:
    """Whether a hook or patch of a user's names a size and branches, as far as its code tells."""
    called = [root for root in own_roots(model, view) if not isinstance(root, nn.Module)]
    codes = (atom for atom in atoms_of(called, model.modules()) if isinstance(atom, CodeType))
    return any(_SIZES & {*code.co_names} and _branches(code) for code in codes)


def _branches(code: CodeType) -> bool:
    names = (instruction.opname for instruction in dis.get_instructions(code))
    return any("JUMP" in name and "_IF_" in name for name in names)
