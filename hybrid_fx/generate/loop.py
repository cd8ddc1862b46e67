"""The fast decoding loop: greedy search and sampling over a session.

transformers' ``generate`` resolves the arguments and hands over its logits processors and
stopping criteria; only the model's forward is ours. The random numbers are drawn as HF draws
them: one multinomial over all ``[B, V]`` at each step, finished rows included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .protocol import Runner, Session
from .request import Request
from .routes import EXACT_CACHES
from .session_cache import SessionCache


def generate_fast(request: Request, runner: Runner) -> Any:
    """Decode by :func:`decode` within HF's ``generate``.

    Returns:
        int64 ``[B, T + new]``, or HF's output object with ``return_dict_in_generate``.
    """
    if request.setting("cache_implementation") in EXACT_CACHES:
        request.fix("cache_implementation", None)  # the workspace is the cache
    # HF hands no streamer to a custom loop; the one below knows it.
    streamer = request.arguments.pop("streamer", None)
    depth = request.causal.config.get_text_config(decoder=True).num_hidden_layers

    def decode_within_hf(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        if streamer is not None:
            streamer.put(input_ids.cpu())
        capacity = max(input_ids.shape[1], generation_config.max_length - 1)
        session = runner.session(batch=input_ids.shape[0], capacity=capacity)
        try:
            columns = prompt_columns(
                input_ids.to(model.device),
                model_kwargs.get("attention_mask"),
                model_kwargs.get("position_ids"),
            )
            logits = prefill(session, columns, generation_config.prefill_chunk_size)
            settings = Settings(
                process=logits_processor,
                stop=stopping_criteria,
                config=generation_config,
                streamer=streamer,
            )
            record = decode(session, logits, input_ids, columns.positions[:, -1:], settings)
        finally:
            session.close()
        if not generation_config.return_dict_in_generate:
            return record.ids
        cached = SessionCache(depth, record.ids[:, :-1]) if model_kwargs["use_cache"] else None
        return GenerateDecoderOnlyOutput(
            sequences=record.ids,
            scores=record.scores,
            logits=record.logits,
            past_key_values=cached,
        )

    return request.generate_by_hf(custom_generate=decode_within_hf)


@dataclass(frozen=True)
class Columns:
    """A prompt as a session takes it: ``ids``, ``positions`` and ``valid`` are ``[B, T]``."""

    ids: Tensor
    positions: Tensor
    valid: Tensor | None


def prompt_columns(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Columns:
    """The columns of a prompt ``[B, T]``, with the positions HF gives where none are given."""
    batch, prompt = ids.shape
    if positions is None and mask is not None:
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    elif positions is None:
        positions = torch.arange(prompt)[None]
    positions = positions.to(device=ids.device, dtype=torch.int64).expand(batch, prompt)
    valid = None if mask is None or bool((mask == 1).all()) else mask.to(ids.device).bool()
    return Columns(ids.long(), positions, valid)


def prefill(session: Session, columns: Columns, chunk: int | None = None) -> Tensor:
    """Run the prompt, ``chunk`` columns at a time; logits of the last column, ``[B, 1, V]``."""
    prompt = columns.ids.shape[1]
    width = chunk or prompt
    for start in range(0, prompt, width):
        part = slice(start, start + width)
        logits = session.forward(
            columns.ids[:, part],
            columns.positions[:, part],
            None if columns.valid is None else columns.valid[:, part],
        )
    return logits


@dataclass(frozen=True)
class Settings:
    """What HF resolved: processors and criteria are its own callables on ``(ids, scores)``."""

    process: Callable[[Tensor, Tensor], Tensor]
    stop: Any
    config: Any
    streamer: Any = None


@dataclass
class Record:
    """The sequences ``[B, T + new]``; scores and logits ``[B, V]`` a step, None where unasked."""

    ids: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    unfinished: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = torch.ones(len(self.ids), dtype=torch.long, device=self.ids.device)


def decode(
    session: Session, logits: Tensor, ids: Tensor, last: Tensor, settings: Settings
) -> Record:
    """Choose tokens until the stopping criteria hold for every row.

    Args:
        session: Holds the columns of ``ids``.
        logits: ``[B, 1, V]`` of the last column.
        ids: The prompt, ``[B, T]``.
        last: The positions of the last column, int64 ``[B, 1]``.
        settings: HF's processors, criteria and generation config.
    """
    config, device = settings.config, ids.device
    keep = bool(config.return_dict_in_generate)
    record = Record(
        ids,
        scores=() if keep and config.output_scores else None,
        logits=() if keep and config.output_logits else None,
    )
    ends = any(hasattr(criterion, "eos_token_id") for criterion in settings.stop)
    pad = config._pad_token_tensor.to(device) if ends else None
    while True:
        raw = logits[:, -1].to(copy=True, dtype=torch.float32, device=device)
        scores = settings.process(record.ids, raw)
        if record.scores is not None:
            record.scores += (scores,)
        if record.logits is not None:
            record.logits += (raw,)
        tokens = pick(scores, sample=config.do_sample)
        if pad is not None:
            tokens = tokens * record.unfinished + pad * (1 - record.unfinished)
        record.ids = torch.cat([record.ids, tokens[:, None]], dim=-1)
        record.unfinished = record.unfinished & ~settings.stop(record.ids, record.scores)
        if settings.streamer is not None:
            settings.streamer.put(tokens.cpu())
        if not bool(record.unfinished.any()):
            break
        last = last + 1
        logits = session.forward(tokens[:, None].to(last.device), last)
    if settings.streamer is not None:
        settings.streamer.end()
    return record


def pick(scores: Tensor, *, sample: bool) -> Tensor:
    """The next tokens, int64 ``[B]``: arg-max, or one draw a row from softmax ``[B, V]``."""
    if not sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
