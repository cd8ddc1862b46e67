"""One generate call, resolved: what was asked, by transformers' own rules, before any work."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.transformers import GenerationMixin
from ..errors import InputError

# Taken off the keyword arguments by generate() before they reach the generation config.
_LOOP_OPTIONS = ("trust_remote_code", "tokenizer", "assistant_tokenizer")


@dataclass
class Request:
    """The arguments of one ``generate`` call and what follows from them.

    Attributes:
        model: What the user holds: an HF causal LM or a PeftModel around one.
        causal: The HF causal LM itself.
        arguments: The named parameters of HF's ``generate`` that were given.
        options: Its ``**kwargs``: generation settings and model inputs.
        config: HF's resolved generation config; a copy, nobody else's.
        model_kwargs: What of ``options`` goes to the model.
        mode: HF's generation mode, e.g. ``"greedy_search"``, ``"sample"``, ``"beam_search"``.
        ids: The prompt, ``[B, T]``, or None (embeddings, or HF starts from BOS).
        mask: The attention mask HF will use, ``[B, T]``, or None where it is all ones.
        total: Columns of the finished sequences at most.
    """

    model: Any
    causal: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    config: Any
    model_kwargs: dict[str, Any]
    mode: str
    ids: Tensor | None
    mask: Tensor | None
    total: int

    @property
    def embeds(self) -> Tensor | None:
        """Embeddings given in place of a prompt, ``[B, T, E]``."""
        return self.model_kwargs.get("inputs_embeds")

    @property
    def prompt(self) -> int:
        """T, the columns of the prompt."""
        return _columns(self.ids, self.embeds)

    def setting(self, name: str) -> Any:
        """A field of the resolved generation config, None where this transformers lacks it."""
        return getattr(self.config, name, None)

    def fix(self, name: str, value: Any) -> None:
        """Make HF's ``generate`` see ``value`` for a setting, whoever gave another one.

        The caller's ``generation_config`` is not written: a copy takes its place.
        """
        given = self.arguments.get("generation_config")
        default = getattr(self.causal.generation_config, name, None)
        if given is not None:
            given = self.arguments["generation_config"] = copy.deepcopy(given)
            setattr(given, name, value)
            self.options.pop(name, None)
        if given is None or (value is None and default is not None):
            self.options[name] = value

    def generate_by_hf(self, **changes: Any) -> Any:
        """HF's own ``generate`` of the causal LM, with these arguments and ``changes``."""
        run = type(self.causal).generate.__get__(self.causal)
        return run(**{**self.arguments, **self.options, **changes})


def causal_lm(model: nn.Module) -> Any:
    """The HF causal LM: ``model`` itself, or what a PeftModel wraps."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def resolve(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request:
    """Bind the arguments as HF's ``generate`` does and resolve its generation config.

    Raises:
        InputError: for a prompt that is not an integer tensor ``[B, T]``.
        TypeError, ValueError: those of transformers, for arguments it refuses.
    """
    causal = causal_lm(model)
    if hasattr(model, "base_model_prepare_inputs_for_generation"):
        # As PeftModelForCausalLM.generate does: a generation config set on the wrapper counts.
        causal.generation_config = model.generation_config
    bound = inspect.signature(GenerationMixin.generate).bind(causal, *args, **kwargs)
    arguments = {k: v for k, v in bound.arguments.items() if k not in ("self", "kwargs")}
    options = dict(bound.arguments.get("kwargs", {}))
    settings = {k: v for k, v in options.items() if k not in _LOOP_OPTIONS}
    given = arguments.get("generation_config")
    config, model_kwargs = causal._prepare_generation_config(given, **settings)
    mode = config.get_generation_mode(arguments.get("assistant_model")).value
    ids = _prompt(causal, arguments.get("inputs"), model_kwargs)
    default_length = all(
        holder is None or getattr(holder, "max_length", None) is None
        for holder in (given, causal.generation_config)
    )
    prompt = _columns(ids, model_kwargs.get("inputs_embeds"))
    if config.max_new_tokens is not None:
        total = prompt + config.max_new_tokens
    elif default_length and settings.get("max_length") is None:
        total = _default_total(causal, config, prompt)
    else:
        total = config.max_length
    mask = model_kwargs.get("attention_mask")
    return Request(
        model=model,
        causal=causal,
        arguments=arguments,
        options=options,
        config=config,
        model_kwargs=model_kwargs,
        mode=mode,
        ids=ids,
        mask=_inferred_mask(config, ids) if mask is None else mask,
        total=total,
    )


def _prompt(causal: Any, inputs: Any, model_kwargs: Mapping[str, Any]) -> Tensor | None:
    """The prompt's ids, wherever they were given; None where something else is the input."""
    other = causal.config.is_encoder_decoder or causal.main_input_name != "input_ids"
    ids = model_kwargs.get("input_ids") if inputs is None else inputs
    if other or ids is None or model_kwargs.get("inputs_embeds") is not None:
        return None
    if isinstance(ids, Mapping):
        raise InputError(
            f"the prompt is a {type(ids).__name__} of {', '.join(map(str, ids))}; "
            "pass its items: generate(**tokens)"
        )
    if not isinstance(ids, Tensor):
        raise InputError(
            f"input_ids is a {type(ids).__name__}; pass an integer tensor of shape [B, T]"
        )
    if ids.dim() != 2:
        raise InputError(
            f"input_ids has shape {list(ids.shape)}; expected [B, T]"
            + ("; add the batch: input_ids[None]" if ids.dim() == 1 else "")
        )
    return ids


def _columns(ids: Tensor | None, embeds: Any) -> int:
    """Of a prompt; 1 where HF starts from BOS."""
    if isinstance(embeds, Tensor) and embeds.dim() == 3:
        return embeds.shape[1]
    return 1 if ids is None else ids.shape[1]


def _default_total(causal: Any, config: Any, prompt: int) -> int:
    """HF's length where nobody set one: 20 new tokens, within the model's positions."""
    total: int = prompt + config.max_length
    limit: int | None = getattr(causal.config, "max_position_embeddings", None)
    return total if limit is None else min(total, limit)


def _inferred_mask(config: Any, ids: Tensor | None) -> Tensor | None:
    """The mask HF infers from pad tokens: only where the pad token is set and ends nothing."""
    pad, eos = config.pad_token_id, config.eos_token_id
    if pad is None or ids is None:
        return None
    endings = torch.as_tensor([] if eos is None else eos, device="cpu").flatten().tolist()
    if int(pad) in endings:
        return None
    mask = ids.ne(int(pad))
    return None if bool(mask.all()) else mask.long()
