"""HF's own decoding loops (beams, assisted, ...) over a session.

For the time of the call the causal LM's ``forward`` is one that runs the session, and HF is given
a :class:`SessionCache`; both are taken away again, whatever happens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import HybridError
from .guard import instance_attribute
from .loop import Columns, prompt_columns
from .protocol import Runner
from .request import Request
from .routes import EXACT_CACHES, padding_fault
from .session_cache import SessionCache

# HF's loops hand these to every forward; they change no logits of a session.
WITHOUT_EFFECT = ("use_cache", "return_dict", "cache_position", "tokenizer", "assistant_tokenizer")


class UnservedError(HybridError, RuntimeError):
    """HF's loop asked the forward for something a session does not do.

    Attributes:
        begun: Whether a forward ran before, so that the call cannot start over unseen.
    """

    def __init__(self, asked: str, *, begun: bool) -> None:
        super().__init__(f"the model's generation loop asks its forward for {asked}")
        self.begun = begun


def generate_by_loop(request: Request, runner: Runner) -> Any:
    """Run HF's ``generate`` with our forward and cache.

    Returns:
        What HF's loop returns; its ``past_key_values`` holds the token ids only.

    Raises:
        UnservedError: where the forward is asked for more than logits of token ids.
    """
    if request.setting("cache_implementation") in EXACT_CACHES:
        request.fix("cache_implementation", None)
    cached = bool(request.setting("use_cache"))
    if not cached:
        request.fix("use_cache", True)
    causal = request.causal
    cache = SessionCache(causal.config.get_text_config(decoder=True).num_hidden_layers)
    forward = session_forward(causal, runner, cache, capacity=request.total)
    try:
        with instance_attribute(causal, "forward", forward):
            result = request.generate_by_hf(past_key_values=cache)
    finally:
        cache.release()
    if cached or isinstance(result, Tensor):
        return result
    return type(result)(**{k: v for k, v in result.items() if k != "past_key_values"})


def session_forward(
    causal: Any, runner: Runner, cache: SessionCache, *, capacity: int
) -> Callable[..., CausalLMOutputWithPast]:
    """A stand-in for ``causal.forward`` under the same signature (HF's generate inspects it).

    It appends the given columns ``[B, T]`` to the session of ``cache``, opened at the first call,
    and returns the logits ``[B, keep, V]`` that ``logits_to_keep`` asks for (0 is all T).
    """

    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        others = {name: value for name, value in others.items() if name not in WITHOUT_EFFECT}
        asked = [name for name, value in others.items() if value is not None and value is not False]
        if input_ids is None:
            asked.append("inputs_embeds")
        if isinstance(logits_to_keep, Tensor):
            asked.append("logits_to_keep as a tensor")
        if position_ids is not None and not _fits(position_ids, input_ids):
            asked.append(f"position_ids of shape {list(position_ids.shape)}")
        if cache.session is None and attention_mask is not None:
            asked += filter(None, [padding_fault(attention_mask)])
        if asked:
            raise UnservedError(", ".join(asked), begun=cache.session is not None)

        assert input_ids is not None
        assert isinstance(logits_to_keep, int)
        batch, width = input_ids.shape
        if cache.session is None:
            cache.session = runner.session(batch=batch, capacity=max(capacity, width))
        elif past_key_values is None:
            cache.reset()  # the loop starts over with the whole sequence
        columns = next_columns(input_ids, attention_mask, position_ids, cache.get_seq_length())
        logits = cache.session.forward(
            columns.ids, columns.positions, columns.valid, keep=logits_to_keep or width
        )
        cache.append(columns.ids)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

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


def _fits(positions: Tensor, ids: Tensor | None) -> bool:
    """Whether positions are ``[B, T]``, or ``[1, T]`` for all rows."""
    if ids is None or positions.dim() != 2 or positions.shape[1] != ids.shape[1]:
        return False
    return positions.shape[0] in (1, ids.shape[0])
