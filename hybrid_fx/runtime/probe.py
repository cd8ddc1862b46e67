"""Check a plan on the live weights before it serves: does it say what the model says?

A captured graph is cut in two (what is prefilled, what is decoded); an architecture whose other
operations look along the sequence would come out wrong, and so would a stored plan whose model
changed in a way that no key saw. A short random prompt, part prefilled and part decoded, against
the whole forward finds both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .closeness import allowed_distance, distance_of
from .runner import PlanRunner

_DECODED = 2


def _length(runner: PlanRunner, limit: int | None) -> int:
    """Longer than the smallest window, where that is short; never beyond the model's limit."""
    windows = [layer.window for layer in runner.plan.manifest.kv if layer.window]
    wanted = max([8, *(window + 4 for window in windows if window <= 64)])
    return min(wanted, limit or wanted)


class Verdict(NamedTuple):
    """What a probe found.

    Attributes:
        settled: Whether the logits could tell: those of weights that hold NaN cannot.
        difference: What differs, or "".
        rows_apart: Whether a row's logits do not depend on the rows beside it.
    """

    settled: bool
    difference: str = ""
    rows_apart: bool = False


def _uncounted(_: str) -> Any:
    """A span that nobody reads: a probe's tokens are not the user's."""
    return nullcontext(SimpleNamespace(tokens=0))


def probe(
    runner: PlanRunner, reference: Callable[[Tensor, Tensor], Tensor], limit: int | None
) -> Verdict:
    """Compare a prepared plan with ``reference(input_ids, position_ids) -> logits``.

    Draws from a generator of its own; the user's random state stays as it is.
    """
    length = _length(runner, limit)
    generator = torch.Generator("cpu").manual_seed(0)
    vocabulary = runner.plan.manifest.vocab_size
    ids = torch.randint(vocabulary, (2, length), generator=generator, device="cpu")
    ids = ids.to(runner.device)
    positions = torch.arange(length, device=runner.device).expand(2, length)
    with torch.no_grad():
        wanted = reference(ids, positions)
        session = runner.session(batch=2, capacity=length, timer=_uncounted, recorded=False)
        try:
            first = max(1, length - _DECODED)
            parts = [session.forward(ids[:, :first], positions[:, :first], keep=first)]
            for at in range(first, length):
                parts.append(session.forward(ids[:, at : at + 1], positions[:, at : at + 1]))
            # Once more, with the second row in place of the first: both say what the second said.
            session.crop(length - 1)
            session.reorder(torch.tensor([1, 1], device=runner.device))
            twice = session.forward(ids[1:, -1:].expand(2, 1), positions[:, -1:])
        finally:
            session.close()
    got = torch.cat(parts, 1)
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        said = f"{got.dtype} {list(got.shape)}, the module's {wanted.dtype} {list(wanted.shape)}"
        return Verdict(True, f"its logits are {said}")
    if bool(wanted.isnan().any()):
        return Verdict(False)
    allowed = allowed_distance(runner.plan.manifest)
    distance = distance_of(got, wanted)
    if not distance <= allowed:
        said = f"its logits differ from the module's by {distance:.1e}, allowed {allowed:.0e}"
        return Verdict(True, said)
    return Verdict(True, rows_apart=distance_of(twice, got[1:, -1:].expand_as(twice)) <= allowed)
