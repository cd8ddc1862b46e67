"""HF's own decoding loops (beams, assisted, ...) over a session.

For the time of the call the causal LM's ``forward`` is one that runs the session, and HF is given
a :class:`SessionCache`; both are taken away again, whatever happens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compat.transformers import (
    WITHOUT_EFFECT,
    DynamicCache,
    cache_argument,
    cache_of,
    forward_output,
    output_without_cache,
    set_cache,
)
from ..errors import HybridError
from .embeds import embeds_fault
from .guard import instance_attribute
from .prompt import Columns, prefill, prompt_columns
from .protocol import Runner
from .request import Request
from .routes import EXACT_CACHES, padding_fault
from .session_cache import SessionCache
from .starting_over import Beginning


class UnservedError(HybridError, RuntimeError):
    """HF's loop asked the forward for something a session does not do.

    Attributes:
        final: Whether the call has gone too far to start over on the module unseen.
    """

    def __init__(self, asked: str, *, final: bool) -> None:
        remedy = "; call the model itself, outside of its engine" if final else ""
        super().__init__(f"the model's generation loop asks its forward for {asked}{remedy}")
        self.final = final


def generate_by_loop(request: Request, runner: Runner) -> Any:
    """Run HF's ``generate`` with our forward and cache.

    Returns:
        What HF's loop returns. The KV cache in it is the caller's own, extended; where none was
        given it holds the token ids only.

    Raises:
        UnservedError: where the forward is asked for more than logits of token ids. Unless it is
            final, random numbers and streamer are as they were.
    """
    if request.setting("cache_implementation") in EXACT_CACHES:
        request.fix("cache_implementation", None)
    cached = bool(request.setting("use_cache"))
    if not cached:
        request.fix("use_cache", True)
    causal = request.causal
    depth = causal.config.get_text_config(decoder=True).num_hidden_layers
    cache = SessionCache(depth, origin=_origin(request))
    beginning = Beginning(request)
    forward = session_forward(causal, runner, cache, beginning, capacity=request.total)
    try:
        with instance_attribute(causal, "forward", forward):
            result = request.generate_by_hf(**{cache_argument(): cache})
        cache.give_back()
    except UnservedError as error:
        if not error.final:
            beginning.restore()
        raise
    finally:
        cache.release()
    if isinstance(result, Tensor):
        return result
    if not cached:
        return output_without_cache(result)
    return result if cache.origin is None else set_cache(result, cache.origin)


def _origin(request: Request) -> Any:
    """The caller's cache; a new one where no token ids could be kept to start from again."""
    origin = cache_of(request.model_kwargs)
    wanted = request.embeds is not None and request.setting("return_dict_in_generate")
    return DynamicCache(config=request.causal.config) if origin is None and wanted else origin


def session_forward(
    causal: Any, runner: Runner, cache: SessionCache, beginning: Beginning, *, capacity: int
) -> Callable[..., Any]:
    """A stand-in for ``causal.forward`` under the same signature (HF's generate inspects it).

    It appends the given columns ``[B, T]`` to the session of ``cache``, opened at the first call,
    and returns the logits ``[B, keep, V]`` that ``logits_to_keep`` asks for (0 is all T).
    """

    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> Any:
        past = others.pop(cache_argument(), None)
        others = {name: value for name, value in others.items() if name not in WITHOUT_EFFECT}
        asked = [name for name, value in others.items() if value is not None and value is not False]
        if isinstance(logits_to_keep, Tensor):
            asked.append("logits_to_keep as a tensor")
        if inputs_embeds is not None:
            asked += filter(None, [embeds_fault(causal, runner, inputs_embeds)])
            input_ids = inputs_embeds.new_full(inputs_embeds.shape[:2], -1, dtype=torch.int64)
        assert input_ids is not None
        batch, width = input_ids.shape
        if position_ids is not None and not _fits(position_ids, input_ids):
            asked.append(f"position_ids of shape {list(position_ids.shape)}")
        begun = cache.session is not None
        if cache.origin is not None and not runner.holds_keys:
            asked.append(f"{cache_argument()}, of which each rank would hold a part")
        if not begun and attention_mask is not None:
            asked += filter(None, [padding_fault(attention_mask)])
            if attention_mask.shape != (batch, cache.get_seq_length() + width):
                asked.append(f"an attention mask of shape {list(attention_mask.shape)}")
        if asked:
            raise UnservedError(", ".join(asked), final=beginning.final)

        assert isinstance(logits_to_keep, int)
        if not begun:
            room = max(capacity, cache.get_seq_length() + width)
            try:
                cache.open(runner.session(batch=batch, capacity=room), attention_mask)
            except ValueError as error:
                said = f"a prefix in {cache_argument()}: {error}"
                raise UnservedError(said, final=beginning.final) from error
        elif past is None:
            cache.reset()  # the loop starts over with the whole sequence
        assert cache.session is not None
        beginning.served()
        columns = next_columns(input_ids, attention_mask, position_ids, cache.get_seq_length())
        plain = inputs_embeds is None and not cache.get_seq_length() and runner.rows_apart
        logits = prefill(
            cache.session,
            replace(columns, ids=columns.ids.clamp_min(0)),
            shared=plain,
            keep=logits_to_keep or width,
            embeds=inputs_embeds,
        )
        cache.append(columns.ids)
        return forward_output(logits, cache)

    forward.__signature__ = inspect.signature(causal.forward)  # type: ignore[attr-defined]
    return forward


def next_columns(ids: Tensor, mask: Tensor | None, positions: Tensor | None, held: int) -> Columns:
    """The columns ``[B, T]`` after ``held`` others; ``mask`` also covers those."""
    whole = ids.new_zeros(ids.shape[0], held + ids.shape[1])
    columns = prompt_columns(whole, mask, None)
    return Columns(
        ids.long(),
        columns.positions[:, held:] if positions is None else positions.expand_as(ids).long(),
        None if columns.valid is None else columns.valid[:, held:],
    )


def _fits(positions: Tensor, ids: Tensor) -> bool:
    """Whether positions are ``[B, T]``, or ``[1, T]`` for all rows."""
    if positions.dim() != 2 or positions.shape[1] != ids.shape[1]:
        return False
    return positions.shape[0] in (1, ids.shape[0])
