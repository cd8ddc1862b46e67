"""Decoding over a session, token for token that of transformers.

    generate(model, runner, args, kwargs, on_fallback=note)

runs one ``model.generate(*args, **kwargs)``. :mod:`.routes` says which way each option goes. Beside
what HF takes, ``max_new_tokens`` may be a list: see :mod:`.lengths`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..compat.transformers import under_current_names
from ..errors import StrictError
from .checks import check_positions, check_request, position_limit
from .guard import inference_mode_of, instance_attribute
from .hf_loop import UnservedError, generate_by_loop
from .lengths import end_rows, take_lengths
from .loop import generate_fast
from .no_rows import empty_result, has_no_rows
from .protocol import Runner, Session
from .request import causal_lm, resolve
from .routes import RULES, Route, choose, is_padded, padding_fault
from .session_cache import SessionCache, drop_finished
from .settings import settings_of

__all__ = [
    "RULES",
    "Route",
    "Runner",
    "Session",
    "SessionCache",
    "causal_lm",
    "generate",
    "inference_mode_of",
    "position_limit",
]

logger = logging.getLogger("hybrid_fx")


def generate(
    model: nn.Module,
    runner: Runner | Callable[[], Runner | None] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    on_fallback: Callable[[str], None],
    strict: bool = False,
    plain_generate: Callable[..., Any] | None = None,
    warned: set[str] | None = None,
    on_settings: Callable[[Mapping[str, str]], None] | None = None,
    sampling: str = "hf",
    on_waiting: Callable[[str, int], None] | None = None,
) -> Any:
    """Generate as ``model.generate(*args, **kwargs)`` would, on ``runner``'s sessions.

    Runs without gradients, dropout and gradient checkpointing; flags, hooks and the model's
    methods stand as before afterwards, also after an exception or KeyboardInterrupt.

    Args:
        model: An HF causal LM, or a PeftModel around one.
        runner: Makes sessions; a function that returns one (called only once the arguments were
            checked and the call needs it); None where the model was not captured.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        on_fallback: Told why a call is not on the fast path, e.g. ``"HF loop: beam search"`` or
            ``"HF module: a right-padded attention mask"``.
        strict: Raise where the call would leave the rewritten graphs.
        plain_generate: The model's ``generate`` as it was before an engine replaced it on the
            instance; by default that of its class.
        warned: Keys of warnings already given, kept by the caller so that one engine warns once.
        on_settings: Where other ranks take part, told what they must be asked for as well. Then
            a prompt without rows is served.
        sampling: Of the fast way: ``"hf"`` or ``"per_sequence"``, see
            :class:`~hybrid_fx.config.HybridConfig`.
        on_waiting: Told why rows that had finished stayed in the batch, and how many tokens were
            computed for them.

    Returns:
        What HF returns: int64 ``[B, T + new]`` or one of its output objects.

    Raises:
        InputError: for input that does not fit the model; nothing was computed then.
        StrictError: with ``strict``, where the call would run the original module.
        TypeError, ValueError: HF's own, for arguments it refuses.
    """
    kwargs = under_current_names(kwargs)
    prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    lengths, kwargs = take_lengths(drop_finished(kwargs, prompt))
    kind: Any = type(model)
    plain = kind.generate.__get__(model) if plain_generate is None else plain_generate
    with torch.no_grad(), inference_mode_of(model), instance_attribute(model, "generate", plain):
        request = resolve(model, args, kwargs)
        nothing = on_settings is not None and has_no_rows(request)
        settings = None if on_settings is None else settings_of(request)
        if not nothing:
            check_request(request)
        if lengths is not None:
            end_rows(request, lengths)
            args, kwargs = (), {**request.arguments, **request.options}
        route, why = choose(request)
        if not nothing:
            beyond = check_positions(request, lengths if route is Route.FAST else None)
            if beyond is not None:
                _warn_once(warned, "positions", beyond)
        if on_settings is not None and settings is not None:
            on_settings(settings)
        if nothing:
            if callable(runner):
                runner()  # the other ranks wait for this one
            return empty_result(request)
        made = None
        if route is not Route.MODULE:
            made = runner() if callable(runner) else runner
            if made is None:
                route, why = Route.MODULE, "no captured graph"
                check_positions(request)  # rows that have ended go on there
            elif on_settings is None and not made.rows_apart and is_padded(request):
                # What stands in padding is each implementation's own, and reaches other rows.
                route, made = Route.MODULE, None
                why = "left padding where a row's logits depend on the rows beside it"
        if made is not None and route is Route.FAST:
            return generate_fast(
                request,
                made,
                sampling=sampling,
                on_waiting=on_waiting,
                alone=on_settings is None,
            )
        if made is not None and route is Route.HF_LOOP:
            try:
                result = generate_by_loop(request, made)
            except UnservedError as reason:
                if reason.final:
                    raise
                why = str(reason)
            else:
                on_fallback(f"HF loop: {why}")
                return result
        if strict:
            raise StrictError(
                f"this generate would run the original module: {why}; change the call, or set "
                "strict=False to allow it"
            )
        drafts = request.setting("is_assistant")  # of a mask that nobody gave
        if request.mask is not None and not drafts and padding_fault(request.mask):
            _warn_once(warned, "padding", f"{why}: generating by transformers' own loop; pad left")
        on_fallback(f"HF module: {why}")
        return plain(*args, **kwargs)


def _warn_once(warned: set[str] | None, key: str, message: str) -> None:
    if warned is None or key not in warned:
        logger.warning(message)
    if warned is not None:
        warned.add(key)
