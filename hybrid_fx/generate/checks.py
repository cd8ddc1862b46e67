"""Bad input, said before any work: what stood there, what the limit is, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat.transformers import cache_of
from ..errors import InputError
from .positions import are_rotary, has_table
from .request import Request


def check_request(request: Request) -> None:
    """Refuse what could not run, or would index past a table.

    Raises:
        InputError: for a prompt that is empty or not integers ``[B, T]``, an id outside the
            vocabulary, or a mask or positions of another shape than the prompt.
    """
    if request.causal.config.is_encoder_decoder:
        return
    if request.ids is not None:
        _check_ids(request.ids, _vocabulary(request.causal))
        _check_mask(request.ids, request.model_kwargs)
    if request.embeds is not None:
        _check_embeds(request.embeds, request.causal)


def position_limit(config: Any) -> int | None:
    """How many positions a model of this config has; None where nothing bounds them.

    A rope scaled by a factor reaches that much further than the length it was trained at; dynamic
    scaling follows the sequence and has no bound.
    """
    text = config.get_text_config(decoder=True)
    limit: int | None = getattr(text, "max_position_embeddings", None)
    limit = getattr(text, "n_positions", None) if limit is None else limit
    if limit is not None and limit < 1:
        return None  # XLNet says -1 for a length without end
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, dict) or limit is None:
        return limit
    if "dynamic" in (rope.get("rope_type"), rope.get("type")):
        return None
    factor = rope.get("factor") or 1.0
    trained = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(trained * factor))


def _vocabulary(causal: Any) -> int | None:
    """Rows of the input embedding: what an id may index. None where a shard hides them."""
    weight = getattr(causal.get_input_embeddings(), "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0]:
        return int(weight.shape[0])
    return getattr(causal.config.get_text_config(decoder=True), "vocab_size", None)


def _check_ids(ids: Tensor, vocabulary: int | None) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"input_ids has dtype {ids.dtype}; token ids must be int64 (or int32)")
    if not ids.numel():
        raise InputError(
            f"input_ids has shape {list(ids.shape)}: the prompt is empty; "
            "give each row at least one token, e.g. the BOS token"
        )
    if vocabulary is None:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        row, column = (int(i) for i in (ids == wrong).nonzero()[0])
        raise InputError(
            f"input_ids[{row}, {column}] is {wrong}, outside the vocabulary of {vocabulary} "
            f"tokens (0 to {vocabulary - 1}); check the tokenizer, or call "
            f"model.resize_token_embeddings({max(wrong, 0) + 1})"
            if wrong >= 0
            else f"input_ids[{row}, {column}] is {wrong}; token ids start at 0 (vocabulary of "
            f"{vocabulary}): replace ignore labels such as -100 by the pad token, and mask them"
        )


def _check_mask(ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    if cache_of(model_kwargs) is not None:
        return  # then the mask also covers the columns of the prefix
    mask = model_kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask has shape {got}, input_ids has {list(ids.shape)}; "
            "generate takes a mask [B, T] of the prompt, 1 at tokens and 0 at padding"
        )
    positions = model_kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        rows = (1, ids.shape[0])
        if positions.shape[1] != ids.shape[1] or positions.shape[0] not in rows:
            raise InputError(
                f"position_ids has shape {list(positions.shape)}, input_ids has "
                f"{list(ids.shape)}; give one position to each token"
            )


def _check_embeds(embeds: Any, causal: Any) -> None:
    table = getattr(causal.get_input_embeddings(), "weight", None)
    size = table.shape[-1] if isinstance(table, Tensor) and table.dim() == 2 else None
    shape = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
    fits = isinstance(embeds, Tensor) and embeds.dim() == 3 and embeds.is_floating_point()
    if not fits or not embeds.numel() or (size and embeds.shape[2] != size):
        raise InputError(
            f"inputs_embeds is {shape}; give one floating-point embedding to each token of a "
            f"prompt: [B, T, {size or 'E'}]"
        )


def check_positions(request: Request, lengths: Sequence[int] | None = None) -> str | None:
    """Refuse more new tokens than the model has positions for, where these are rows of a table.

    Args:
        lengths: Of each row of the prompt, where a row that has ended takes no more positions;
            None where every row goes on until the last one has ended.

    Returns:
        What to warn of, where a model without such a table is asked to go on.

    Raises:
        InputError: naming the row that needs most.
    """
    limit = position_limit(request.causal.config)
    new_tokens = request.total - request.prompt
    if limit is None or new_tokens < 1 or request.causal.config.is_encoder_decoder:
        return None
    starts, named = _starts(request), "max_new_tokens"
    start = max(starts)
    if lengths is not None:
        each = starts if len(starts) == len(lengths) else [start] * len(lengths)
        ends = [sum(pair) for pair in zip(each, lengths, strict=True)]
        row = ends.index(max(ends))
        named, start, new_tokens = f"max_new_tokens[{row}]", each[row], lengths[row]
    needed = start + new_tokens - 1  # the last token is returned and never fed
    if needed <= limit:
        return None
    said = f"{named}={new_tokens} after a prompt of {start} tokens needs {needed} positions; "
    if not has_table(request.causal, limit):
        return f"{said}the model was made for {limit}: what it says beyond them may be of no use"
    room = limit - start + 1
    remedy = f"use {named}<={room}" if room > 0 else f"shorten the prompt to {limit} tokens"
    raise InputError(f"{said}the model has {limit}: {remedy}")


def clamp_limit(causal: Any) -> int | None:
    """Where the positions of rows that have finished must stop; None where they may go on."""
    limit = position_limit(causal.config)
    endless = limit is None or (are_rotary(causal) and not has_table(causal, limit))
    return None if endless else limit


def past_positions(request: Request) -> str | None:
    """What is asked of positions that the model may treat in a way of its own, or None."""
    limit = position_limit(request.causal.config)
    if limit is None or request.causal.config.is_encoder_decoder:
        return None
    needed = max(_starts(request), default=0) + request.total - request.prompt - 1
    if needed <= limit or are_rotary(request.causal) or has_table(request.causal, limit):
        return None  # a table that ends is refused as such
    return f"positions beyond the {limit} that the model was made for"


def _starts(request: Request) -> list[int]:
    """The positions that each row of the prompt takes, padding apart; one where all are alike."""
    positions = request.model_kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.numel():
        rows = positions if positions.dim() == 2 else positions.reshape(1, -1)
        counts = rows.amax(-1) + 1
    elif request.mask is None or request.mask.dim() != 2:
        return [request.prompt]
    else:
        counts = (request.mask != 0).sum(-1)
    found: list[int] = counts.tolist()
    return found
