"""Supervised warm-up: next-token training on written-out solutions, until it is half good."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .task import Problem

Report = Callable[[int, float, float | None], None]  # step, loss, probe accuracy if measured


def supervised_batch(
    problems: Sequence[Problem], tokenizer: Any, *, prefix: str, end: str, device: torch.device
) -> dict[str, Tensor]:
    """Return left-padded ids, mask and labels [B, T]; labels are -100 outside of the solution."""
    heads = tokenizer([prefix + p.prompt for p in problems], add_special_tokens=False).input_ids
    tails = tokenizer([p.solution + end for p in problems], add_special_tokens=False).input_ids
    width = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    rows, masks, labels = [], [], []
    for head, tail in zip(heads, tails, strict=True):
        gap = width - len(head) - len(tail)
        rows.append([tokenizer.pad_token_id] * gap + head + tail)
        masks.append([0] * gap + [1] * (width - gap))
        labels.append([-100] * (gap + len(head)) + tail)
    named = {"input_ids": rows, "attention_mask": masks, "labels": labels}
    return {name: torch.tensor(value, device=device) for name, value in named.items()}


def warm_up(
    model: nn.Module,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    steps: int,
    batch: int,
    lr: float,
    target: float,
    accuracy: Callable[[], float],
    check_every: int,
    prefix: str,
    end: str,
    seed: int,
    report: Report,
) -> float:
    """Train ``model`` in place until ``accuracy()`` reaches ``target``, or for ``steps`` steps.

    Stopping by accuracy and not by steps leaves every seed the same room for GRPO.

    Returns:
        The last accuracy measured.
    """
    draw = random.Random(seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    reached = 0.0
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 50)
        chosen = draw.choices(problems, k=batch)
        inputs = supervised_batch(chosen, tokenizer, prefix=prefix, end=end, device=device)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        checked = step % check_every == 0 or step == steps
        if checked:
            reached = accuracy()
            model.train()
        report(step, loss.item(), reached if checked else None)
        if checked and reached >= target:
            break
    return reached
