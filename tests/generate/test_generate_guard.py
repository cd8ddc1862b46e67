"""What stands before a generate stands after it: flags, methods, gradients, sessions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate.same_as_hf import is_fast, new_model, prompt, run, same_as_hf, shared_model, watched
from upstream_names import CACHE

from hybrid_fx.errors import InputError
from hybrid_fx.generate import SessionCache, generate, inference_mode_of

ROWS = prompt((3, 6))


def flags(model: torch.nn.Module) -> list[tuple[bool, Any]]:
    return [(m.training, vars(m).get("gradient_checkpointing")) for m in model.modules()]


def mixed_model() -> Any:
    """In train mode with dropout and checkpointing, one layer in eval."""
    model = new_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    model.gradient_checkpointing_enable()
    model.train()
    model.transformer.h[1].eval()
    return model


def test_flags_are_off_inside_and_restored_one_by_one() -> None:
    model = mixed_model()
    before = flags(model)
    with inference_mode_of(model):
        assert not any(m.training for m in model.modules())
        assert not model.is_gradient_checkpointing
    assert flags(model) == before
    assert not all(training for training, _ in before)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"output_hidden_states": True}])
def test_no_route_sees_dropout_and_each_restores_the_flags(options: dict[str, Any]) -> None:
    model = mixed_model()
    before = flags(model)
    ran = run(model, **ROWS, max_new_tokens=8, **options)
    assert flags(model) == before
    plain = new_model("gpt2").generate(**ROWS, max_new_tokens=8, **options)
    assert ran.result.tolist() == plain.tolist()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("in the middle")])
@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_restores_everything(error: BaseException, at: int) -> None:
    model = mixed_model()
    before, runner = flags(model), watched(model)
    runner.fail_at, runner.error = at, error
    with pytest.raises(type(error)):
        run(model, **ROWS, max_new_tokens=8, runner=runner)
    assert flags(model) == before
    assert runner.sessions[0].closed
    model(**ROWS, labels=ROWS["input_ids"]).loss.backward()


def test_nothing_records_gradients() -> None:
    ran = run(
        shared_model(),
        **ROWS,
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert not ran.result.scores[0].requires_grad
    assert torch.is_grad_enabled()


def test_an_instance_generate_is_never_entered_and_comes_back() -> None:
    model = new_model()

    def patched(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the instance's generate was called")

    plain = model.generate
    model.generate = patched
    for options in ({}, {"num_beams": 2}, {"output_hidden_states": True}):
        kwargs = {**ROWS, "max_new_tokens": 3, **options}
        out = generate(
            model, watched(model), (), kwargs, on_fallback=lambda _: None, plain_generate=plain
        )
        assert out.shape == (2, 9)
        assert vars(model)["generate"] is patched


def test_a_returned_cache_continues_a_conversation() -> None:
    model = shared_model()
    first = run(model, **ROWS, max_new_tokens=5, return_dict_in_generate=True, eos_token_id=None)
    cache = first.result[CACHE]
    assert isinstance(cache, SessionCache)
    assert cache.get_seq_length() == 10
    longer = torch.cat([first.result.sequences, torch.tensor([[7, 8], [9, 4]])], -1)
    mask = torch.nn.functional.pad(ROWS["attention_mask"], (0, 7), value=1)
    again = run(model, longer, attention_mask=mask, **{CACHE: cache}, max_new_tokens=4)
    assert is_fast(again)
    expected = model.generate(longer, attention_mask=mask, max_new_tokens=4)
    assert again.result.tolist() == expected.tolist()


def test_a_returned_cache_refuses_what_it_cannot_do() -> None:
    model = shared_model()
    cache = run(model, **ROWS, max_new_tokens=5, return_dict_in_generate=True).result[CACHE]
    with pytest.raises(InputError, match="does not begin with them; pass the whole sequence"):
        run(model, torch.tensor([[7, 8], [9, 4]]), **{CACHE: cache})
    with pytest.raises(InputError, match="holds no keys; pass it to generate"):
        model(torch.tensor([[7], [9]]), **{CACHE: cache})


def test_the_cache_repeats_selects_and_crops_the_rows_of_its_session() -> None:
    model = shared_model()
    session = watched(model).session(batch=2, capacity=6)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    cache = SessionCache(2)
    cache.session = session
    session.forward(ids, torch.arange(4).expand(2, 4))
    cache.append(ids)
    assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (4, 2, 2)
    assert not cache.is_compileable
    cache.batch_repeat_interleave(2)
    assert cache.ids[:, 0].tolist() == [5, 5, 9, 9]
    assert session.batch == 4
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.ids[:, 0].tolist() == [9, 5]
    cache.crop(-1)
    assert cache.get_seq_length() == session.length == 3
    cache.crop(0)
    cache.crop(5)
    assert session.length == 3
    cache.crop(2)
    assert session.length == 2
    cache.reset()
    assert not cache.is_initialized
    assert session.length == 0
    cache.release()
    cache.release()
    assert session.closed


def test_two_calls_on_one_model_do_not_see_each_other() -> None:
    model = shared_model()
    alone = same_as_hf(model, **ROWS, max_new_tokens=6)
    run(model, **prompt((4, 5), seed=3), max_new_tokens=9, num_beams=2)
    assert same_as_hf(model, **ROWS, max_new_tokens=6).result.tolist() == alone.result.tolist()
