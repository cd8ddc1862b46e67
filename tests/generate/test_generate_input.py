"""Bad input is refused before any work, naming the value, the limit and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate.same_as_hf import is_fast, new_model, prompt, run, same_as_hf, shared_model
from transformers import BatchEncoding, LlamaConfig, XLNetConfig

from hybrid_fx.errors import InputError
from hybrid_fx.generate import position_limit

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "id too big": ({"input_ids": IDS + 52}, r"\[1, 2\] is 62, outside the vocabulary of 61"),
    "negative id": ({"input_ids": IDS - 9}, r"\[0, 0\] is -4; token ids start at 0"),
    "float ids": ({"input_ids": IDS.float()}, "dtype torch.float32; token ids must be int64"),
    "one row": ({"input_ids": IDS[0]}, r"shape \[3\]; expected \[B, T\]; add the batch"),
    "three dimensions": ({"input_ids": IDS[None]}, r"shape \[1, 2, 3\]; expected \[B, T\]"),
    "no tokens": ({"input_ids": IDS[:, :0]}, r"shape \[2, 0\]: the prompt is empty"),
    "no rows": ({"input_ids": IDS[:0]}, r"shape \[0, 3\]: the prompt is empty"),
    "a list": ({"input_ids": [[5, 6]]}, "is a list; pass an integer tensor"),
    "an encoding": (
        {"inputs": BatchEncoding({"input_ids": IDS})},
        r"a BatchEncoding of input_ids; pass its items: generate\(\*\*tokens\)",
    ),
    "mask too long": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 4)},
        r"attention_mask has shape \[2, 4\], input_ids has \[2, 3\]",
    ),
    "mask of one row": (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 3)},
        r"attention_mask has shape \[1, 3\]",
    ),
    "mask of four dimensions": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)},
        r"shape \[2, 1, 3, 3\].*takes a mask \[B, T\]",
    ),
    "mask as a list": (
        {"input_ids": IDS, "attention_mask": [1, 1]},
        "attention_mask has shape list",
    ),
    "positions": (
        {"input_ids": IDS, "position_ids": torch.zeros(2, 2, dtype=torch.long)},
        r"position_ids has shape \[2, 2\].*one position to each token",
    ),
    "too many new tokens": (
        {"input_ids": IDS, "max_new_tokens": 127},
        "max_new_tokens=127 after a prompt of 3 tokens needs 129 positions; the model has 128: "
        "use max_new_tokens<=126",
    ),
    "too long": ({"input_ids": IDS, "max_length": 130}, "needs 129 positions"),
    "prompt too long": (
        {"input_ids": torch.full((1, 140), 5), "max_new_tokens": 1},
        "shorten the prompt to 128 tokens",
    ),
}


#: Rotary positions go on, see ``tests/laws/test_positions_end.py``.
ENDS = ("too many new tokens", "too long", "prompt too long")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        (name, f)
        for name in BAD
        for f in ("llama", "gpt2", "opt")
        if f != "llama" or name not in ENDS
    ],
)
def test_bad_input_is_refused_before_a_runner_is_asked_for(name: str, family: str) -> None:
    kwargs, message = BAD[name]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(InputError, match=message):
        run(shared_model(family), **kwargs, runner=lambda: pytest.fail("a runner was made"))
    torch.set_rng_state(state)


@pytest.mark.parametrize("route", [{}, {"num_beams": 2}, {"output_hidden_states": True}])
def test_the_limit_holds_on_every_route(route: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the model has 128"):
        run(shared_model("gpt2"), IDS, max_new_tokens=200, **route)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_the_last_position_can_be_used(family: str) -> None:
    ids = prompt((120,))["input_ids"]
    ran = same_as_hf(shared_model(family), ids, max_new_tokens=9, eos_token_id=None)
    assert is_fast(ran)
    assert ran.result.shape == (1, 129)


def test_padding_takes_no_positions() -> None:
    rows = prompt((60, 60))
    wide = {k: torch.nn.functional.pad(v, (40, 0)) for k, v in rows.items()}
    ran = same_as_hf(shared_model("gpt2"), **wide, max_new_tokens=69, eos_token_id=None)
    assert is_fast(ran)
    with pytest.raises(InputError, match="use max_new_tokens<=69"):
        run(shared_model("gpt2"), **wide, max_new_tokens=70)


def test_the_default_length_stays_within_the_positions() -> None:
    ids = prompt((115,))["input_ids"]
    assert same_as_hf(shared_model("gpt2"), ids, eos_token_id=None).result.shape == (1, 128)


def test_resized_embeddings_move_the_vocabulary() -> None:
    model = new_model()
    model.resize_token_embeddings(70)
    assert is_fast(same_as_hf(model, IDS + 55, max_new_tokens=3))
    with pytest.raises(InputError, match="vocabulary of 70"):
        run(model, IDS + 60, max_new_tokens=3)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 400),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 50}, 100),
    ],
)
def test_scaled_rope_moves_the_limit(rope: dict[str, Any], limit: int | None) -> None:
    config = LlamaConfig(max_position_embeddings=100, rope_parameters={**rope, "rope_theta": 1e4})
    assert position_limit(config) == limit


def test_a_length_without_end_is_no_limit() -> None:
    assert position_limit(XLNetConfig(d_model=32, n_head=4)) is None
