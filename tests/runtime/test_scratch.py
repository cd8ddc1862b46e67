"""Memory that a prepare uses again: never while anybody holds it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapted, prompt, randomize_adapters, tiny

import hybrid_fx
from hybrid_fx.passes import folding
from hybrid_fx.runtime.scratch import Scratch

CPU = torch.device("cpu")
CALL = {**prompt((5, 3)), "max_new_tokens": 4, "do_sample": False}


def test_memory_that_nobody_holds_is_given_again_and_no_other() -> None:
    scratch = Scratch()
    first = scratch.empty((2, 3), torch.float32, CPU).fill_(1)
    address = first.data_ptr()
    second = scratch.empty((6, 1), torch.float32, CPU).fill_(2)
    assert second.data_ptr() != address
    view = first.t()[1:]
    del first
    third = scratch.empty((2, 3), torch.float32, CPU).fill_(3)
    assert third.data_ptr() not in (address, second.data_ptr()), "a view still holds the first"
    assert view.eq(1).all()
    assert second.eq(2).all()
    del view
    again = scratch.empty((3, 4), torch.bfloat16, CPU)
    assert again.data_ptr() == address
    assert (again.shape, again.dtype, again.is_contiguous()) == ((3, 4), torch.bfloat16, True)


def test_memory_of_another_size_is_other_memory() -> None:
    scratch = Scratch()
    address = scratch.empty((64,), torch.float32, CPU).data_ptr()
    kept = scratch.empty((63,), torch.float32, CPU)
    assert kept.untyped_storage().nbytes() == 4 * 63
    assert kept.data_ptr() != address
    assert scratch.empty((0, 3), torch.float32, CPU).shape == (0, 3)


def test_forgotten_memory_stays_with_who_holds_it() -> None:
    scratch = Scratch()
    kept = scratch.empty((2,), torch.float32, CPU).fill_(1)
    scratch.release()
    assert scratch.empty((2,), torch.float32, CPU).fill_(2).data_ptr() != kept.data_ptr()
    assert kept.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["packed", "as it is"])
def test_a_prepare_folds_layer_after_layer_in_the_same_memory(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    fresh = torch.empty

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        made.append((memory := fresh(*args, **kwargs)).nbytes)
        return memory

    model = adapted(tiny("llama", layers=4).to(dtype))
    model.to(dtype)
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        engine.generate(**CALL)
        runner = engine._graphs.runner
        for seed in (1, 2):
            randomize_adapters(model, seed, 0.1)
            model.to(dtype)
            engine.weights_changed()
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", counted)
                made.clear()
                runner.prepare(engine._graphs.tensors())
            folds = len(runner.plan.manifest.lora)
            blocks = [size for size in made if size]
            assert 0 < len(blocks) <= 2 * folds / 4, "a result and pieces for those of one layer"
            expected = engine._plain_generate(**CALL)
            assert torch.equal(engine.generate(**CALL), expected)
        assert not runner._scratch._blocks


def test_what_is_kept_is_never_given_again() -> None:
    """In float64 folded weights are kept as they are: later layers must not write over them."""
    model = adapted(tiny("llama", layers=3).double()).double()
    randomize_adapters(model, 5, 0.1)
    model.double()
    with hybrid_fx.hybridize(model, disk_cache=False) as engine:
        engine.generate(**CALL)
        runner = engine._graphs.runner
        tensors = runner.prepared.tensors
        names = [tensor.name for tensor in runner.plan.manifest.prepared]
        for number in range(3):
            down = f"base_model.model.model.layers.{number}.mlp.down_proj"
            module = model.get_submodule(down)
            a, b = (module.get_parameter(f"lora_{side}.default.weight") for side in "AB")
            folded = folding.fold_lora(module.base_layer.weight, a, b, module.scaling["default"])
            (held,) = (t for t, name in zip(tensors, names, strict=True) if name.startswith(down))
            assert torch.equal(held, folded)
