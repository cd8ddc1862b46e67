"""Law 2 where a row's tokens depend on the rows beside it: all rows stay, as in transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from laws.against_hf import hf_generate
from tiny_models import PAD, tiny
from torch import nn

import hybrid_fx

#: Three rows of which two are alike; random models end rows at any of these tokens.
CALL = {
    "input_ids": torch.tensor([[5, 6, 7], [9, 3, 12], [9, 3, 12]]),
    "attention_mask": torch.ones(3, 3, dtype=torch.int64),
    "max_new_tokens": 14,
    "pad_token_id": PAD,
    "eos_token_id": list(range(20, 50)),
}


def against_the_mean(_: Any, __: Any, out: Any) -> Any:
    return out - out.mean(0, keepdim=True) / 2


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_hook_that_looks_across_rows_gives_the_tokens_of_transformers(
    sample: bool, beams: int
) -> None:
    model = tiny("qwen2")
    model.model.layers[0].register_forward_hook(against_the_mean)
    call = {**CALL, "do_sample": sample, "num_beams": beams, "top_k": 0}
    plain = copy.deepcopy(model)
    torch.manual_seed(3)
    wanted = hf_generate(plain, **call)
    with hybrid_fx.hybridize(model) as engine:
        engine.generate(**call)
        torch.manual_seed(3)
        assert engine.generate(**call).tolist() == wanted.tolist()
        assert not any("HF module" in way for way in engine.stats.fallbacks)
        assert any("rows beside it" in note for note in engine.explain().notes)


@pytest.mark.parametrize("beams", [1, 2])
def test_with_padding_such_a_model_runs_as_the_module_and_says_so(beams: int) -> None:
    model = tiny("qwen2")
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Softmax(dim=0))
    mask = CALL["attention_mask"].clone()
    mask[1, 0] = 0
    call = {**CALL, "attention_mask": mask, "do_sample": False, "num_beams": beams}
    wanted = hf_generate(copy.deepcopy(model), **call)
    with hybrid_fx.hybridize(model) as engine:
        assert engine.generate(**call).tolist() == wanted.tolist()
        assert any("left padding where" in way for way in engine.stats.fallbacks)


def test_rows_of_other_models_stand_apart() -> None:
    with hybrid_fx.hybridize(tiny("qwen2")) as engine:
        engine.generate(**CALL)
        assert engine._graphs.runner.rows_apart
        assert not any("rows beside it" in note for note in engine.explain().notes)
