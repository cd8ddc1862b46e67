"""How a GRPO step learns from a rollout: rows in batches, or each prompt once with all its samples.

In both, the gradient is that of the gains times the log-probabilities of the sampled tokens, and
logits are computed of those tokens alone. Legend: B rows, T tokens of a prompt, L of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from forced import Work
from torch import Tensor

#: Minus the gain of all rows, in parts that are computed one after the other: (model, tokens
#: [B, T + longest], work, advantages [B], rows at once).
Learning = Callable[[Any, Tensor, Work, Tensor, int], Iterator[Tensor]]


def by_rows(
    model: Any, out: Tensor, work: Work, gains: Tensor, rows_at_once: int
) -> Iterator[Tensor]:
    """Rows sorted by length, in batches cut to their longest; as trainers do."""
    order = sorted(range(len(work.lengths)), key=work.lengths.__getitem__)
    prompt = work.ids.shape[1]
    for start in range(0, len(order), rows_at_once):
        rows = order[start : start + rows_at_once]
        lengths = torch.tensor([work.lengths[row] for row in rows], device=out.device)
        longest = int(lengths.max())
        ids = out[rows, : prompt + longest]
        mask = torch.ones_like(ids)
        inside = torch.arange(longest, device=out.device) < lengths[:, None]
        mask[:, prompt:] = inside
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=longest + 1).logits
        gained = _gain(logits[:, :-1], ids[:, prompt:], gains[rows, None])
        yield -(gained * inside).sum() / work.tokens


def by_prompts(
    model: Any, out: Tensor, work: Work, gains: Tensor, rows_at_once: int
) -> Iterator[Tensor]:
    """One sequence for each prompt, its samples one behind the other; no sample sees another.

    The mask of attention is [1, 1, L, L], and each sample counts its positions from the prompt on.
    """
    prompt, device = work.ids.shape[1], out.device
    _, of_row = work.ids.unique(dim=0, return_inverse=True)
    for number in range(int(of_row.max()) + 1):
        rows = (of_row == number).nonzero().flatten().tolist()
        for start in range(0, len(rows), rows_at_once):
            here = rows[start : start + rows_at_once]
            lengths = torch.tensor([work.lengths[row] for row in here], device=device)
            # Which sample a token belongs to, 0 for the prompt, and how far it is from its first.
            part = torch.arange(len(here) + 1, device=device).repeat_interleave(
                torch.cat([lengths.new_tensor([prompt]), lengths])
            )
            begins = torch.cat([lengths.new_zeros(1), prompt + lengths.cumsum(0) - lengths])
            index = torch.arange(len(part), device=device)
            inner, sampled = index - begins[part], part > 0
            positions = inner + prompt * sampled
            ids = out[here][(part - 1).clamp_min(0), positions]
            seen = (part[:, None] == part) | (part == 0)
            seen &= index <= index[:, None]
            # The logits of a sample's first token are those of the prompt's last one.
            before = torch.where(inner == 0, prompt - 1, index - 1)[sampled]
            logits = model(
                input_ids=ids[None],
                attention_mask=seen[None, None],
                position_ids=positions[None],
                logits_to_keep=before,
            ).logits
            gained = _gain(logits[0], ids[sampled], gains[here][part[sampled] - 1])
            yield -gained.sum() / work.tokens


def _gain(logits: Tensor, tokens: Tensor, gains: Tensor) -> Tensor:
    """On policy: gains [...] times a ratio of 1, whose gradient is that of log-probabilities."""
    log_probs = torch.log_softmax(logits.float(), -1)
    chosen = log_probs.gather(-1, tokens[..., None])[..., 0]
    return torch.exp(chosen - chosen.detach()) * gains


#: Ways to learn by name.
LEARNING: dict[str, Learning] = {"rows": by_rows, "prompts": by_prompts}
