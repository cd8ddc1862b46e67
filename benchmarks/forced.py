"""The grpo workload: prompts, the lengths that are forced on every side, and the rule that does it.

Four prompts of 256 tokens, eight samples of each; lengths from a fixed long-tailed distribution.
The last token of the vocabulary ends a row; before its length is reached it is never drawn.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def drawn_lengths(rows: int, *, shortest: int, longest: int) -> list[int]:
    """``int(lognormvariate(3.6, 0.8))`` of ``random.Random(0)``, clipped; one for each row."""
    rng = random.Random(0)
    drawn = (int(rng.lognormvariate(3.6, 0.8)) for _ in range(rows))
    return [min(max(length, shortest), longest) for length in drawn]


class ForcedEnd(LogitsProcessor):
    """Row i draws ``eos`` as its token number ``lengths[i]``, and not before.

    Args:
        prompt: Tokens of the prompt, its padding included.
    """

    def __init__(self, lengths: Sequence[int], prompt: int, eos: int) -> None:
        self._lengths, self._prompt, self._eos = torch.tensor(lengths), prompt, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after tokens [B, T]."""
        step = input_ids.shape[1] - self._prompt + 1
        scores[:, self._eos] = float("-inf")
        ends = (self._lengths <= step).nonzero().flatten().to(scores.device)
        scores[ends] = float("-inf")
        scores[ends, self._eos] = 0.0
        return scores


@dataclass(frozen=True, slots=True)
class Work:
    """One rollout.

    Attributes:
        ids: Prompts [B, T], each ``samples`` times, one behind the other.
        lengths: New tokens of each row, B of them.
        eos: The token that ends a row.
    """

    ids: Tensor
    lengths: list[int]
    eos: int

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(self.lengths)

    def short(self) -> Work:
        """The same prompts with a few new tokens: to warm a side up."""
        return replace(self, lengths=[min(length, 4) for length in self.lengths])

    def by_length(self) -> dict[str, Any]:
        """Arguments of hybrid_fx's generate alone: sampling, and the length of each row."""
        return {**SAMPLING, "max_new_tokens": self.lengths, "pad_token_id": 0}

    def options(self) -> dict[str, Any]:
        """Arguments of generate: sampling, and the rule that ends rows."""
        rule = ForcedEnd(self.lengths, self.ids.shape[1], self.eos)
        return {
            **SAMPLING,
            "max_new_tokens": max(self.lengths),
            "eos_token_id": self.eos,
            "pad_token_id": 0,
            "logits_processor": [rule],
        }

    def check(self, out: Tensor) -> Tensor:
        """``out`` [B, T + longest], where every row has its length and is padded with 0 behind it.

        Raises:
            RuntimeError: where not.
        """
        prompt = self.ids.shape[1]
        if out.shape != (len(self.lengths), prompt + max(self.lengths)):
            raise RuntimeError(f"tokens of shape {tuple(out.shape)} are not those asked for")
        places = torch.arange(max(self.lengths), device=out.device)
        behind = places >= torch.tensor(self.lengths, device=out.device)[:, None]
        if out[:, prompt:][behind].any():
            raise RuntimeError("a row went on behind its length")
        return out


def work(model: Any, args: argparse.Namespace) -> Work:
    """The rollout of ``args``: ``--prompts``, ``--samples``, ``--prompt-tokens``, ``--longest``."""
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(2)
    shape = (args.prompts, args.prompt_tokens)
    ids = torch.randint(1, vocab - 1, shape, generator=generator).to(args.device)
    shortest = min(4, args.longest)
    lengths = drawn_lengths(args.prompts * args.samples, shortest=shortest, longest=args.longest)
    return Work(ids.repeat_interleave(args.samples, 0), lengths, vocab - 1)
