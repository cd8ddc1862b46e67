"""Rollouts: prompts in, sampled completions out, and the mask of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .clock import now
from .task import Problem, reward

# What the loss calls the policy is the plain softmax: no filter may stand between them, and a
# checkpoint's own generation config often sets some.
PLAIN_SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
GREEDY = {
    "do_sample": False,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled sequences; B rows, P prompt columns, T new columns.

    Attributes:
        ids: [B, P + T] int64, prompts padded on the left, completions on the right.
        mask: [B, P + T] bool, False at padding on either side.
        new: Number T of sampled columns.
        texts: B completions.
        seconds: Wall time of ``generate`` alone.
    """

    ids: Tensor
    mask: Tensor
    new: int
    texts: list[str]
    seconds: float

    @property
    def completion_mask(self) -> Tensor:
        """[B, T] bool: the sampled tokens, each row's end-of-sequence token included."""
        return self.mask[:, -self.new :]

    @property
    def tokens(self) -> int:
        """Number of sampled tokens, padding after the end not counted."""
        return int(self.completion_mask.sum())


def until_end(ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Return the mask [B, T] of ``ids`` [B, T] up to and with the first id that is in ``ends``.

    The padding is told from its place and not from its id, as pad and end may be the same id.
    """
    ended = torch.isin(ids, torch.tensor(list(ends), device=ids.device)).cumsum(-1)
    before = torch.nn.functional.pad(ended, (1, 0))[:, :-1]
    return before == 0


@dataclass(frozen=True, slots=True)
class Sampler:
    """How problems become token rows, and ``generate``'s rows become a rollout.

    Attributes:
        prefix: Text put before each prompt.
        ends: Ids that end a sequence.
        max_new_tokens: Longest completion.
    """

    tokenizer: Any
    device: torch.device
    prefix: str
    ends: tuple[int, ...]
    max_new_tokens: int

    def __call__(self, model: Any, problems: Sequence[Problem], **settings: Any) -> Rollout:
        """Generate once for all problems; ``settings`` go to ``generate``."""
        prompts = self.tokenizer(
            [self.prefix + problem.prompt for problem in problems],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        ).to(self.device)
        tokens = {name: prompts[name] for name in ("input_ids", "attention_mask")}
        start = now(self.device)
        ids = model.generate(
            **tokens,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.ends),
            pad_token_id=self.tokenizer.pad_token_id,
            **settings,
        )
        seconds = now(self.device) - start
        new = ids[:, tokens["input_ids"].shape[1] :]
        given = tokens["attention_mask"].bool()
        given = given.repeat_interleave(len(ids) // len(given), dim=0)
        mask = torch.cat([given, until_end(new, self.ends)], dim=1)
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return Rollout(ids, mask, new.shape[1], texts, seconds)


def accuracy(
    model: Any, sampler: Sampler, problems: Sequence[Problem], *, batch: int = 128
) -> float:
    """Return the fraction of problems that greedy decoding answers rightly."""
    model.eval()
    right = 0.0
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        texts = sampler(model, part, **GREEDY).texts
        pairs = zip(texts, part, strict=True)
        right += sum(reward(text, problem.answer) for text, problem in pairs)
    return right / len(problems)
