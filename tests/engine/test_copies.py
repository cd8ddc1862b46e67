"""Why a prepared tensor is a copy is told by what the plan records of it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tiny_models import adapted, prompt, tiny

import hybrid_fx


@pytest.mark.parametrize(
    ("lora", "reason"),
    [("fold", "adapters are folded into it"), ("side", "share_storage=False")],
)
def test_the_reason_of_a_copy_does_not_depend_on_what_operators_are_called(
    lora: str, reason: str
) -> None:
    model = adapted(tiny("llama"))
    off = ("pack_weights",)
    with hybrid_fx.hybridize(model, lora=lora, share_storage=False, disable_passes=off) as engine:
        engine.generate(**prompt((3,)), max_new_tokens=2, do_sample=False)
        told = engine.explain().copies
        assert reason in {copy.reason for copy in told}
        prepared = engine._graphs.runner.prepared
        prepared._wanted = tuple(
            replace(tensor, recipe=re.sub(r"fold_lora|concat_rows", "renamed", tensor.recipe))
            for tensor in prepared._wanted
        )
        assert engine.explain().copies == told
