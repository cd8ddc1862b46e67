"""The registries of transformers and the model's config come back, whatever a capture runs into."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from captured_models import decoder
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybrid_fx.capture import capture, registry
from hybrid_fx.capture.registry import canonical_attention
from hybrid_fx.errors import CaptureError


def _state(model: nn.Module) -> tuple[Any, ...]:
    return (
        dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping),
        dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        model.config._attn_implementation,
        [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        [module.training for module in model.modules()],
        torch.is_grad_enabled(),
    )


@pytest.fixture
def model() -> Iterator[Any]:
    """A model in train mode; nothing of the registries, its config or flags may change."""
    model = decoder("llama", layers=1).train()
    before = _state(model)
    yield model
    assert _state(model) == before


def test_a_capture_leaves_everything_as_it_was(model: Any) -> None:
    capture(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_capture_that_fails_leaves_everything_as_it_was(
    model: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules[capture.__module__], "trace", fail)
    with pytest.raises(error):
        capture(model)


def test_a_forward_that_raises_leaves_everything_as_it_was(model: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("this forward fails")

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(CaptureError, match="this forward fails"):
        capture(model)
    handle.remove()


def test_an_interrupt_while_the_forward_is_traced_leaves_everything_as_it_was(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "compile", lambda function, **_: interrupt)
    with pytest.raises(KeyboardInterrupt):
        capture(model)


def test_the_entry_exists_inside_the_block_only(model: Any) -> None:
    with canonical_attention(model):
        name = model.config._attn_implementation
        assert name in ALL_ATTENTION_FUNCTIONS._global_mapping
        assert name in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    assert name not in ALL_ATTENTION_FUNCTIONS._global_mapping


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_each_implementation_of_transformers_is_replaced_and_restored(name: str) -> None:
    model = decoder("llama", layers=1)
    model.set_attn_implementation(name)
    capture(model)
    assert model.config._attn_implementation == name


def test_a_users_own_attention_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = decoder("llama", layers=1)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out, weights = sdpa(module, *args, **kwargs)
        return out * 2, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", mine)
    mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", mask)
    model.set_attn_implementation("mine")
    with pytest.raises(CaptureError, match="attention implementation 'mine'"):
        capture(model)
    assert model.config._attn_implementation == "mine"
    model.set_attn_implementation("sdpa")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", mine)
    with pytest.raises(CaptureError, match="attention implementation 'sdpa'"):
        capture(model)


def test_attention_that_is_given_a_bias_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama", layers=1)
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def biased(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs, position_bias=torch.zeros(1, 4, 1, 1))

    monkeypatch.setattr(attention, "forward", biased)
    with pytest.raises(CaptureError, match="gives its attention position_bias"):
        capture(model)


@pytest.mark.parametrize("by_mask", [True, False])
def test_without_a_mask_a_window_counts_where_the_implementation_listens(by_mask: bool) -> None:
    """SDPA and eager attention never look at the window that they are told."""
    query, key, value = (torch.randn(1, 2, 9, 4) for _ in range(3))
    given = {"scaling": 0.5, "sliding_window": 3, "by_mask": by_mask}
    got, _ = registry._attention(nn.Module(), query, key, value, None, **given)
    window = 0 if by_mask else 3
    assert torch.equal(got, torch.ops.hybrid_fx.attention(query, key, value, 0.5, window))
    assert not torch.equal(got, torch.ops.hybrid_fx.attention(query, key, value, 0.5, 3 - window))
