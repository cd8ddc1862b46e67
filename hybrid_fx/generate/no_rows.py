"""A prompt without rows: what a rank that has nothing to generate gets back.

transformers does not define it. The result has no rows and the columns of the prompt.
"""

from __future__ import annotations

from typing import Any

from ..compat.transformers import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from .request import Request


def has_no_rows(request: Request) -> bool:
    """Whether the prompt is ``[0, T]``, T at least 1."""
    return request.ids is not None and not request.ids.shape[0] and request.ids.shape[1] > 0


def empty_result(request: Request) -> Any:
    """int64 ``[0, T]``, or HF's output object around it with ``return_dict_in_generate``."""
    assert request.ids is not None
    ids = request.ids.long().clone()
    if not request.setting("return_dict_in_generate"):
        return ids
    more: dict[str, Any] = {
        name: () for name in ("scores", "logits") if request.setting(f"output_{name}")
    }
    if not request.mode.startswith("beam"):
        return GenerateDecoderOnlyOutput(sequences=ids, **more)
    if request.setting("output_scores"):
        more["sequences_scores"] = ids.new_zeros(0).float()
        more["beam_indices"] = ids.new_zeros(0, 0)
    return GenerateBeamDecoderOnlyOutput(sequences=ids, **more)
