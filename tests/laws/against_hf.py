"""Hold what an engine does against transformers on the same module.

An engine puts its ``generate`` on the instance; that of the class is still transformers' own, so
the reference needs no second model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

#: A first difference is excused where HF's own margin is below this share of its logit range.
NEAR_TIE = 1e-4


def hf_generate(model: Any, **arguments: Any) -> Any:
    """transformers' own generate on ``model`` as it stands."""
    return type(model).generate(model, **arguments)


@contextmanager
def module_forwards(model: nn.Module) -> Iterator[list[str]]:
    """The class names of ``model``'s modules whose forward runs inside the block.

    Seen by the interpreter's profiler: a hook or a patched class would be another structure, and
    be captured again.
    """
    names = {inspect.unwrap(type(m).forward).__code__: type(m).__name__ for m in model.modules()}
    called: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in names:
            called.append(names[frame.f_code])

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(before)


def near_ties(model: Any, call: Mapping[str, Any], got: Tensor, want: Tensor) -> int:
    """How many rows differ, each by a near-tie of HF's own at the first difference.

    Args:
        call: The arguments of the greedy call, ``return_dict_in_generate`` apart.
        got: Our tokens, int64 ``[B, S]``.
        want: HF's.

    Raises:
        AssertionError: for a difference that is no near-tie.
    """
    if got.shape == want.shape and bool((got == want).all()):
        return 0
    asked = {"return_dict_in_generate": True, "output_logits": True}
    logits = torch.stack(hf_generate(model, **call, **asked).logits, 1)  # [B, new, V]
    prompt, excused = call["input_ids"].shape[1], 0
    for row in range(want.shape[0]):
        shared = min(got.shape[1], want.shape[1])
        differs = (got[row, :shared] != want[row, :shared]).nonzero()
        if not len(differs):
            continue
        step = int(differs[0]) - prompt
        here = logits[row, step]
        margin = here.max() - here[got[row, prompt + step]]
        share = float(margin / (here.max() - here.min()))
        assert share < NEAR_TIE, f"row {row} differs at step {step}; HF's margin is {share:.1e}"
        excused += 1
    return excused


def same_tokens(engine: Any, **call: Any) -> Tensor:
    """Generate both ways from one random state: equal tokens, equal random state after.

    Returns:
        The tokens, int64 ``[B, T + new]``.
    """
    given = dict(call)
    make = given.pop("make_processors", None)
    before = torch.get_rng_state()
    extra = {} if make is None else {"logits_processor": LogitsProcessorList(make())}
    want = hf_generate(engine.module, **given, **extra)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    extra = {} if make is None else {"logits_processor": LogitsProcessorList(make())}
    got: Tensor = engine.generate(**given, **extra)
    assert got.tolist() == want.tolist()
    assert torch.equal(torch.get_rng_state(), after)
    return got


def logits_of(engine: Any, ids: Tensor, positions: Tensor, valid: Tensor, prefill: int) -> Tensor:
    """Teacher-forced logits ``[B, T, V]`` of the rewritten graphs, ``prefill`` columns at once."""
    runner = engine._graphs.ready()
    session = runner.session(batch=ids.shape[0], capacity=ids.shape[1])
    try:
        with torch.no_grad():
            first = slice(0, prefill)
            parts = [
                session.forward(ids[:, first], positions[:, first], valid[:, first], keep=prefill)
            ]
            for at in range(prefill, ids.shape[1]):
                column = slice(at, at + 1)
                parts.append(
                    session.forward(ids[:, column], positions[:, column], valid[:, column])
                )
    finally:
        session.close()
    return torch.cat(parts, 1)


def forced_logits(engine: Any, ids: Tensor) -> Tensor:
    """:func:`logits_of` for rows without padding, half of them prefilled."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    valid = torch.ones_like(ids, dtype=torch.bool)
    return logits_of(engine, ids, positions, valid, max(1, ids.shape[1] // 2))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer, by name."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def assert_bit_identical(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """The same names, and under each the same bits."""
    assert list(got) == list(want)
    for name, tensor in want.items():
        if isinstance(tensor, Tensor):
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(got[name], tensor), name
        else:
            assert got[name] == tensor, name
