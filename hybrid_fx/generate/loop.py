"""The fast way: greedy search and sampling, decoded over a session.

transformers' ``generate`` resolves the arguments and hands over its logits processors and
stopping criteria; only the model's forward is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..compat.transformers import GenerateDecoderOnlyOutput, set_cache
from ..runtime.moving import is_asynchronous
from .checks import clamp_limit
from .choose import Choose, largest
from .decode import Settings, decode
from .hf_draws import HFDraws
from .own_draws import OwnDraws
from .prompt import prefill, prompt_columns
from .protocol import Runner
from .request import Request
from .routes import EXACT_CACHES
from .session_cache import SessionCache


def generate_fast(
    request: Request,
    runner: Runner,
    *,
    sampling: str = "hf",
    on_waiting: Callable[[str, int], None] | None = None,
    alone: bool = True,
) -> Any:
    """Decode by :func:`~hybrid_fx.generate.decode.decode` within HF's ``generate``.

    Rows with the same prompt are prefilled once, where a row does not depend on those beside it.

    Args:
        sampling: ``"hf"`` draws what HF draws, ``"per_sequence"`` by a generator of each row's.
        alone: Whether this process forwards by itself. Where ranks do so together, each counts on
            the forwards of the others, and none is queued that may be dropped.
        on_waiting: As of :func:`~hybrid_fx.generate.generate`.

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
        columns = prompt_columns(
            input_ids.to(model.device),
            model_kwargs.get("attention_mask"),
            model_kwargs.get("position_ids"),
        )
        session = runner.session(batch=len(input_ids), capacity=capacity)
        try:
            chunk = generation_config.prefill_chunk_size
            record = decode(
                session,
                prefill(session, columns, shared=runner.rows_apart, chunk=chunk),
                input_ids,
                columns.positions[:, -1:],
                Settings(
                    process=logits_processor,
                    stop=stopping_criteria,
                    config=generation_config,
                    choose=_choice(generation_config.do_sample, len(input_ids), sampling),
                    streamer=streamer,
                    rows_apart=runner.rows_apart,
                    limit=clamp_limit(request.causal),
                    ahead=alone and is_asynchronous(input_ids.device),
                ),
            )
        finally:
            session.close()
        if record.waited and on_waiting is not None:
            on_waiting(record.stays, record.waited)
        if not generation_config.return_dict_in_generate:
            return record.ids
        cached = SessionCache(depth, record.ids[:, :-1]) if model_kwargs["use_cache"] else None
        output = GenerateDecoderOnlyOutput(
            sequences=record.ids, scores=record.scores, logits=record.logits
        )
        return output if cached is None else set_cache(output, cached)

    return request.generate_by_hf(custom_generate=decode_within_hf)


def _choice(sample: bool, batch: int, sampling: str) -> Choose:
    if not sample:
        return largest
    return OwnDraws() if sampling == "per_sequence" else HFDraws(batch)
