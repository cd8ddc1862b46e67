"""Law 2 in bfloat16: the rewritten graphs are no further from float32 than HF itself is.

Tokens cannot be held against each other in bfloat16, teacher-forced logits can. The tolerance is
1.5 times the distance of HF's own bfloat16 forward to the same weights in float32: both round, but
not at the same places.
"""

from __future__ import annotations

import copy

import pytest
import torch
from laws.against_hf import logits_of
from tiny_models import FAMILIES, prompt, tiny

import hybrid_fx

FACTOR = 1.5


@pytest.mark.parametrize("kind", [*FAMILIES, "mistral", "qwen3", "phi3"])
def test_logits_are_as_near_to_float32_as_those_of_transformers(kind: str) -> None:
    model = tiny(kind, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    given = prompt((40, 25, 33, 12, 1, 40), 1)
    ids, mask = given["input_ids"], given["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with hybrid_fx.hybridize(model) as engine, torch.no_grad():
        ours = logits_of(engine, ids, positions, mask.bool(), prefill=20)
        theirs = model(**call, use_cache=False).logits
        wanted = exact(**call, use_cache=False).logits
    assert ours.dtype == theirs.dtype
    shown = mask.bool()
    allowed = FACTOR * float((theirs.float() - wanted)[shown].norm())
    distance = float((ours.float() - wanted)[shown].norm())
    print(f"{kind}: {distance:.3g} from float32, {allowed:.3g} allowed")
    assert 0 < distance <= allowed
