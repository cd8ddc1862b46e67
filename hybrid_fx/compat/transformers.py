"""What is assumed of transformers: its names, its signatures, the protocol of its caches.

No other file imports it. Names that change from release to release are read from signatures; what
cannot be read is said in one sentence, and the calls that need it run the module. Tried on
transformers 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from transformers import GenerationConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.utils import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
)
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "ALL_STATIC_CACHE_IMPLEMENTATIONS",
    "TELLS_LENGTHS",
    "WITHOUT_EFFECT",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerateBeamDecoderOnlyOutput",
    "GenerateDecoderOnlyOutput",
    "GenerationConfig",
    "GenerationMixin",
    "GradientCheckpointingLayer",
    "HeldCache",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "build_mask",
    "cache_argument",
    "cache_of",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "forward_output",
    "logits_process",
    "loop_fault",
    "output_cache_name",
    "output_without_cache",
    "set_cache",
    "stopping_criteria",
    "under_current_names",
]

#: What a KV cache has been called as an argument and as a field of an output, newest first.
_CACHE_NAMES = ("cache", "past_key_values")

#: Names under which a newer transformers still takes one.
_FORMER_NAMES = ("past_key_values", "cache_params")

#: What of a forward's arguments tells user code how many tokens there are and were.
TELLS_LENGTHS = ("get_seq_length", "cache_position")

#: What the loops of ``generate`` hand to every forward, and changes no logits of a session.
WITHOUT_EFFECT = frozenset(
    "use_cache return_dict cache_position tokenizer assistant_tokenizer".split()
)


def _named(function: Callable[..., Any]) -> str | None:
    """What a function calls the KV cache that it takes."""
    parameters = inspect.signature(function).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


@functools.cache
def cache_argument() -> str:
    """The name under which ``generate`` takes a KV cache and hands it to each forward.

    Where it cannot be read it is the latest that is known; :func:`loop_fault` says so.
    """
    return _named(GenerationMixin.prepare_inputs_for_generation) or _CACHE_NAMES[0]


def output_cache_name(kind: type) -> str | None:
    """The field of an output class that holds the KV cache; ``None`` where none is known."""
    declared = getattr(kind, "__dataclass_fields__", ())
    return next((name for name in _CACHE_NAMES if name in declared), None)


@functools.cache
def loop_fault() -> str | None:
    """Why no loop of this transformers can run over a cache of ours, in one sentence, or None."""
    known = " or ".join(_CACHE_NAMES)
    prepare = GenerationMixin.prepare_inputs_for_generation
    if _named(prepare) is None:
        given = ", ".join(inspect.signature(prepare).parameters)
        return (
            f"transformers {transformers.__version__} prepares the inputs of a forward from "
            f"{given}: none of them is {known}"
        )
    for kind in (CausalLMOutputWithPast, GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput):
        if output_cache_name(kind) is None:
            return (
                f"{kind.__name__} of transformers {transformers.__version__} has no field {known}"
            )
    return None


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a ``generate`` or a forward, or None."""
    return arguments.get(cache_argument())


def under_current_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a ``generate``, a cache under the name that this transformers calls it.

    A former name gives way to the current one where both are given, as in transformers.
    """
    current = cache_argument()
    if current == _CACHE_NAMES[-1]:
        return dict(arguments)  # before the renaming each name had a meaning of its own
    named = {name: value for name, value in arguments.items() if name not in _FORMER_NAMES}
    for name in _FORMER_NAMES:
        if name in arguments:
            named.setdefault(current, arguments[name])
    return named


def forward_output(logits: Any, cache: Any) -> Any:
    """What a causal LM's forward returns: logits ``[B, T, V]`` and the cache it has extended."""
    return CausalLMOutputWithPast(logits=logits, **_field(CausalLMOutputWithPast, cache))


def set_cache(output: Any, cache: Any) -> Any:
    """An output of ``generate`` that holds ``cache`` in place of what it held."""
    for name, value in _field(type(output), cache).items():
        output[name] = value
    return output


def output_without_cache(output: Any) -> Any:
    """An output of ``generate`` without its KV cache."""
    name = output_cache_name(type(output))
    return type(output)(**{key: value for key, value in output.items() if key != name})


def _field(kind: type, cache: Any) -> dict[str, Any]:
    name = output_cache_name(kind)
    return {} if name is None else {name: cache}


def build_mask(build: Callable[..., Any], **arguments: Any) -> Any:
    """What a function of ``masking_utils`` builds for a forward without a KV cache."""
    name = _named(build)
    return build(**arguments, **({} if name is None else {name: None}))


class HeldCache(Cache):  # type: ignore[misc]
    """A KV cache whose keys and values lie elsewhere, for the loops of ``generate``.

    To them it has layers like those of a ``DynamicCache``: each is asked whether it is linear,
    slides, can be cropped or compiled, and each release asks something more. None holds anything.

    Args:
        layers: L.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(layers)])
