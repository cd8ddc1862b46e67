"""Which way a generate call goes, as data.

========  =====================================================================================
route     what runs
========  =====================================================================================
FAST      HF resolves the arguments, our loop decodes: greedy search and sampling.
HF_LOOP   HF's decoding loop over the rewritten graphs and their KV workspace.
MODULE    HF's ``generate`` on the original module.
========  =====================================================================================

A call is FAST unless a rule below fires; the rule that leads furthest from FAST decides, and
every rule with that route is reported. What stays FAST because HF's own objects are used as they
are: temperature, top-k, top-p, min-p, typical-p, epsilon and eta cutoffs, repetition penalty,
n-gram bans, bad words, forced and suppressed tokens, sequence bias, watermarking, minimum and
maximum lengths, several EOS ids, ``num_return_sequences``, ``max_time``, custom
``logits_processor``, ``stopping_criteria`` and ``prefix_allowed_tokens_fn``, ``streamer``,
``return_dict_in_generate`` with ``output_scores`` and ``output_logits``, ``prefill_chunk_size``.
What stays FAST and has no effect on tokens: ``use_cache=False``, ``synced_gpus`` (decoding runs
no collectives), ``compile_config``, and the cache kinds in ``EXACT_CACHES`` (the KV workspace is
the cache).

On the FAST route a row that has finished leaves the batch, unless something may look across rows
(:mod:`.staying`: a processor or criterion of the user's, a watermark, ...) or scores or logits are
returned; ``sampling="per_sequence"`` counts there alone. Prompts that stand in several rows are
prefilled once on the routes FAST and HF_LOOP.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..cache.adapters import active_adapters, configs
from ..compat.placement import device_of
from ..compat.transformers import (
    ALL_STATIC_CACHE_IMPLEMENTATIONS,
    GenerationMixin,
    cache_argument,
    cache_of,
    loop_fault,
)
from .checks import past_positions
from .hf_cache import cache_fault
from .request import Request


class Route(IntEnum):
    """In order of distance from the rewritten graphs."""

    FAST = 0
    HF_LOOP = 1
    MODULE = 2


@dataclass(frozen=True)
class Rule:
    """``fires`` returns why a call takes ``route``, or None where the rule does not apply."""

    name: str
    route: Route
    fires: Callable[[Request], str | None]


LOOP_MODES = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")
EXACT_CACHES = ("dynamic", "offloaded", *ALL_STATIC_CACHE_IMPLEMENTATIONS)
PLAIN_INPUTS = (
    *("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"),
    *("output_attentions", "output_hidden_states"),  # these have a rule of their own
)
# These override prepare_inputs_for_generation for the sake of long rope only.
PLAIN_WITHOUT_LONGROPE = ("Phi3ForCausalLM", "PhimoeForCausalLM")


def _own_generate(r: Request) -> str | None:
    if type(r.causal).generate is not GenerationMixin.generate:
        return f"{type(r.causal).__name__} has a generate() of its own"
    if r.model is not r.causal and not type(r.model).generate.__module__.startswith("peft."):
        return f"{type(r.model).__name__} has a generate() of its own"
    return None


def _architecture(r: Request) -> str | None:
    if r.causal.config.is_encoder_decoder:
        return "an encoder-decoder model"
    if r.causal.main_input_name != "input_ids":
        return f"the model's input is {r.causal.main_input_name}, not input_ids"
    return None


def _peft(r: Request) -> str | None:
    kept = configs(r.model)
    for name in active_adapters(r.model) if kept else ():
        config: Any = kept.get(name)
        if getattr(config, "is_prompt_learning", False):
            return f"adapter {name!r} is prompt learning ({config.peft_type.value})"
        if getattr(config, "alora_invocation_tokens", None):
            return f"adapter {name!r} is an activated LoRA"
    given = [k for k in ("adapter_names", "alora_offsets") if r.options.get(k) is not None]
    return f"{given[0]} picks adapters by row" if given else None


def _inputs(r: Request) -> str | None:
    known = (*PLAIN_INPUTS, *_starting_inputs())
    given = [k for k, v in r.model_kwargs.items() if v is not None and k not in known]
    return f"model inputs {', '.join(sorted(given))}" if given else None


def _positions(r: Request) -> str | None:
    positions = r.model_kwargs.get("position_ids")
    # HF's generate reads the signature too: such a forward counts columns, padding included.
    if "position_ids" not in inspect.signature(r.causal.forward).parameters and (
        positions is not None or is_padded(r)
    ):
        return f"the forward of {type(r.causal).__name__} names no position_ids"
    if positions is None or (isinstance(positions, Tensor) and positions.dim() == 2):
        return None
    return "position_ids that are no [B, T] tensor"


def _padding(r: Request) -> str | None:
    return None if r.mask is None else padding_fault(r.mask)


def is_padded(r: Request) -> bool:
    """Whether some column of some row is none of its prompt."""
    return r.mask is not None and not bool(r.mask.all())


def padding_fault(mask: Tensor) -> str | None:
    """What keeps a mask ``[B, T]`` from being left padding, or None."""
    if mask.dim() != 2:
        return f"an attention mask of {mask.dim()} dimensions"
    valid = mask.bool()
    if not bool((valid.to(mask.dtype) == mask).all()):
        return "an attention mask with values other than 0 and 1"
    if not bool(valid.any(-1).all()):
        return "an attention mask with a row of padding only"
    if not bool(valid[:, -1].all()):
        return "a right-padded attention mask"
    if not bool((valid[:, 1:] >= valid[:, :-1]).all()):
        return "an attention mask with holes"
    return None


def _outputs(r: Request) -> str | None:
    asked = [k for k in ("output_attentions", "output_hidden_states") if r.setting(k)]
    return " and ".join(asked) or None


def _custom_loop(r: Request) -> str | None:
    return "custom_generate" if r.arguments.get("custom_generate") is not None else None


def _mode(r: Request) -> str | None:
    return None if r.mode in LOOP_MODES else f"generation mode {r.mode}"


def _cache(r: Request) -> str | None:
    if r.setting("prefill_chunk_size") is not None and not r.setting("use_cache"):
        return "prefill_chunk_size without a cache"  # HF refuses it
    kind = r.setting("cache_implementation")
    return None if kind is None or kind in EXACT_CACHES else f"cache_implementation={kind!r}"


def _calls_module(r: Request) -> str | None:
    if (scale := r.setting("guidance_scale")) is not None and scale != 1:
        return "guidance_scale: the guidance runs the module itself at each step"
    return "token_healing" if r.setting("token_healing") else None


def _assistant(r: Request) -> str | None:
    """Drafts that come out of the target's own layers or states, or are made for another model."""
    if r.setting("is_assistant"):
        return "this model drafts for another one"
    assistant = r.arguments.get("assistant_model")
    if r.setting("assistant_early_exit") is not None:
        return "assistant_early_exit"
    if assistant is not None and assistant in (r.model, r.causal):
        return "the model is its own assistant"
    shares_states = ("Gemma4Assistant", "Gemma4UnifiedAssistant")
    if (
        r.setting("use_mtp")
        or r.setting("speculation_type") is not None
        or type(assistant).__name__.startswith(shares_states)
    ):
        return "drafts from the target's hidden states"
    return None


def _autocast(r: Request) -> str | None:
    kind = device_of(r.causal).type
    return f"autocast is on for {kind}" if torch.is_autocast_enabled(kind) else None


def _own_inputs(r: Request) -> str | None:
    cls = type(r.causal)
    for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample"):
        method = getattr(r.causal, name)
        if getattr(method, "__func__", method) is getattr(GenerationMixin, name):
            continue
        rope = getattr(r.causal.config, "rope_parameters", None) or {}
        longrope = "longrope" in (rope.get("rope_type"), rope.get("type"))
        if cls.__name__ not in PLAIN_WITHOUT_LONGROPE or longrope or name in vars(r.causal):
            return f"{cls.__name__} has a {name}() of its own"
    return None


def _loop_mode(r: Request) -> str | None:
    return None if r.mode in ("greedy_search", "sample") else r.mode.replace("_", " ")


def _starting_inputs() -> tuple[str, ...]:
    """What a prompt may start from beside or in place of token ids."""
    return ("inputs_embeds", cache_argument())


def _start(r: Request) -> str | None:
    given = [k for k in _starting_inputs() if r.model_kwargs.get(k) is not None]
    return " and ".join(given) or None


def _prefix(r: Request) -> str | None:
    cache = cache_of(r.model_kwargs)
    if cache is None:
        return None
    without = f"{cache_argument()} without use_cache"
    return without if not r.setting("use_cache") else cache_fault(cache)


def _stop_strings(r: Request) -> str | None:
    return "stop_strings" if r.setting("stop_strings") is not None else None


def _wrapped(r: Request) -> str | None:
    """HF's loop calls the module, so what is wrapped around its call would run once more."""
    causal, own_inputs = r.causal, _own_inputs(r)
    needed = _loop_mode(r) or _stop_strings(r) or _start(r) or own_inputs
    if needed is None:
        return None
    if (fault := loop_fault()) is not None:
        return f"{needed}; {fault}"
    hooks = (causal._forward_hooks, causal._forward_pre_hooks, vars(causal).get("_hf_hook"))
    if any(hooks) or causal._compiled_call_impl is not None:
        return f"{needed} with a hook or a compiled call on the model"
    if hasattr(causal, "_reorder_cache") and r.mode.startswith("beam"):
        return f"{type(causal).__name__} reorders its cache itself"
    return None


RULES: tuple[Rule, ...] = (
    Rule("own generate", Route.MODULE, _own_generate),
    Rule("architecture", Route.MODULE, _architecture),
    Rule("peft", Route.MODULE, _peft),
    Rule("inputs", Route.MODULE, _inputs),
    Rule("prefix", Route.MODULE, _prefix),
    Rule("positions", Route.MODULE, _positions),
    Rule("padding", Route.MODULE, _padding),
    Rule("past positions", Route.MODULE, past_positions),
    Rule("outputs", Route.MODULE, _outputs),
    Rule("custom loop", Route.MODULE, _custom_loop),
    Rule("mode", Route.MODULE, _mode),
    Rule("cache", Route.MODULE, _cache),
    Rule("calls module", Route.MODULE, _calls_module),
    Rule("assistant", Route.MODULE, _assistant),
    Rule("autocast", Route.MODULE, _autocast),
    Rule("wrapped", Route.MODULE, _wrapped),
    Rule("loop mode", Route.HF_LOOP, _loop_mode),
    Rule("start", Route.HF_LOOP, _start),
    Rule("stop strings", Route.HF_LOOP, _stop_strings),
    Rule("own inputs", Route.HF_LOOP, _own_inputs),
)


def choose(request: Request) -> tuple[Route, str]:
    """The route of a call, and why it is not FAST (``""`` where it is)."""
    fired = [(rule.route, why) for rule in RULES if (why := rule.fires(request)) is not None]
    route = max((route for route, _ in fired), default=Route.FAST)
    return route, "; ".join(why for where, why in fired if where is route)
