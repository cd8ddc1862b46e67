"""Ways of transformers to generate, each on the same weights as a model of its own.

Tried with transformers 5.17 and 5.23, whose ``_compile_all_devices`` and continuous batching this
takes as they are there.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

NAMES = ("generate", "static", "batch")
TITLES = {
    "generate": "transformers generate",
    "static": "static cache, compiled",
    "batch": "generate_batch",
}
_PAGE = 64


def twin(model: Any) -> Any:
    """A copy that holds the same parameters and buffers, with a configuration of its own."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def graphs_compiled() -> int:
    """Graphs that Dynamo has handed to a compiler in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def static_options(device: str, positions: int) -> dict[str, Any]:
    """Arguments of generate for a static cache of ``positions``, the decode step compiled.

    A CPU is left out unless ``_compile_all_devices`` says otherwise; it has no CUDA graphs either.
    """
    config = CompileConfig(fullgraph=True, dynamic=False)
    if device == "cpu":
        config = CompileConfig(fullgraph=True, dynamic=False, mode="default")
        config._compile_all_devices = True
    return {
        "cache_implementation": "static",
        "max_cache_len": positions,
        "compile_config": config,
    }


def generate(model: Any, ids: Tensor, **options: Any) -> Callable[[int], Tensor]:
    """By ``generate`` of ``model``, from full rows ``ids`` [B, T]."""
    mask = torch.ones_like(ids)
    return lambda new: model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, **options
    )


def must_compile(call: Callable[[], object]) -> None:
    """Run ``call``, the first that can compile.

    Raises:
        RuntimeError: where transformers compiled nothing in it.
    """
    before = graphs_compiled()
    call()
    if graphs_compiled() == before:
        raise RuntimeError("transformers did not compile the decode step")


class BatchSession:
    """Continuous batching of ``model``, with room for all rows at once.

    Args:
        positions: The most that a row has, prompt and new tokens.
        tokens: Tokens of prompts in one forward, at most.
        share: Whether equal beginnings of prompts are computed once. They stay from call to call.
    """

    def __init__(
        self, model: Any, rows: int, positions: int, tokens: int, *, share: bool, **options: Any
    ) -> None:
        pages = math.ceil(positions / _PAGE) + 1
        known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
        sizes = ContinuousBatchingConfig(
            **{"page_size" if "page_size" in known else "block_size": _PAGE},
            num_blocks=rows * pages,
            max_batch_tokens=max(tokens, rows),
            allow_block_sharing=share,
        )
        config = GenerationConfig(
            max_new_tokens=positions, eos_token_id=-1, pad_token_id=0, **options
        )
        self._context = model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=sizes, timeout=5
        )

    def __enter__(self) -> BatchSession:
        with torch.no_grad():
            self._manager = self._context.__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        self._context.__exit__(*given)

    def __call__(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        """New tokens of each prompt, ``lengths[i]`` of prompt i.

        Raises:
            RuntimeError: where a request did not come back, or came back with an error.
        """
        names = [
            self._manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        found: dict[str, Any] = {}
        while len(found) < len(names):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            elif result is None and not self._manager.is_running():
                break
        missing = [name for name in names if name not in found]
        failed = [str(result.error) for result in found.values() if result.error is not None]
        if missing or failed:
            raise RuntimeError(f"{len(missing)} of {len(names)} requests lost; {failed[:1]}")
        return [found[name].generated_tokens for name in names]
