"""``max_new_tokens`` as a list: a length for each row of the prompt.

Beside a ``max_length`` it counts alone, as one number does in transformers, which warns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat.transformers import StoppingCriteria, StoppingCriteriaList
from ..errors import InputError
from .request import Request


class RowLengths(StoppingCriteria):  # type: ignore[misc]
    """Ends row i after ``lengths[i]`` new tokens; one object serves one call.

    Attributes:
        eos_token_id: None; that there is one tells transformers to pad what has finished.
    """

    eos_token_id = None

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = torch.tensor(lengths, device="cpu")
        self._prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """bool ``[B]``: which rows of ``[B, T + new]`` are as long as they may be."""
        if self._prompt is None:
            self._prompt = input_ids.shape[1] - 1  # first asked behind the first new token
        self._lengths = self._lengths.to(input_ids.device)
        return self._lengths <= input_ids.shape[1] - self._prompt


def take_lengths(kwargs: Mapping[str, Any]) -> tuple[list[int] | None, dict[str, Any]]:
    """The lengths of a call and its arguments with the longest in their place.

    Returns:
        None and the arguments as they are, where ``max_new_tokens`` is no list.

    Raises:
        InputError: for entries that are not positive ints.
    """
    given: Any = kwargs.get("max_new_tokens")
    if getattr(given, "ndim", 0) == 1:  # a tensor or an array
        given = given.tolist()
    if not isinstance(given, list | tuple):
        return None, dict(kwargs)
    given = [length.tolist() if hasattr(length, "tolist") else length for length in given]
    for row, length in enumerate(given):
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise InputError(
                f"max_new_tokens[{row}] is {length!r}; give each row a positive number of tokens"
            )
    return list(given), {**kwargs, "max_new_tokens": max(given, default=1)}


def end_rows(request: Request, lengths: Sequence[int]) -> None:
    """Let each row of ``request`` end at its own length, that of its prompt.

    Raises:
        InputError: where there are more or fewer lengths than prompts, for beams and assisted
            decoding, and where lengths differ and no token is there to pad with.
    """
    prompt = request.ids if request.embeds is None else request.embeds
    rows = 1 if prompt is None else len(prompt)
    if len(lengths) != rows:
        raise InputError(
            f"max_new_tokens has {len(lengths)} lengths, the prompt has {rows} rows; give one to "
            "each (num_return_sequences repeats it)"
        )
    if request.mode not in ("greedy_search", "sample"):
        raise InputError(
            f"max_new_tokens as a list is for greedy search and sampling; this call is "
            f"{request.mode.replace('_', ' ')}: give one number for all rows"
        )
    if len(set(lengths)) < 2:
        return
    if request.setting("pad_token_id") is None and request.setting("eos_token_id") is None:
        raise InputError(
            "max_new_tokens differs from row to row, and neither pad_token_id nor eos_token_id "
            "is set to fill shorter rows with; pass pad_token_id"
        )
    repeats = request.setting("num_return_sequences") or 1
    own = RowLengths([length for length in lengths for _ in range(repeats)])
    theirs = request.arguments.get("stopping_criteria") or ()
    request.arguments["stopping_criteria"] = StoppingCriteriaList([*theirs, own])
