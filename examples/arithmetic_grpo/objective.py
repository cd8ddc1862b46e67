"""GRPO's arithmetic: advantages inside a group, log-probabilities, the clipped objective.

Source: Shao et al., "DeepSeekMath" (2024), without the KL term; the loss is a mean over tokens, as
in Yu et al., "DAPO" (2025).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Return ``(reward - mean) / (std + eps)`` inside each group: [G, n] -> [G, n] float32.

    A group whose samples all earn the same teaches nothing: its advantages are zero.
    """
    rewards = rewards.float()
    spread = rewards.std(dim=1, keepdim=True, correction=0)
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + eps)


def token_log_probs(
    model: Any, ids: Tensor, mask: Tensor, new: int, *, temperature: float, positions: bool
) -> Tensor:
    """Return the log-probabilities [B, new] of the last ``new`` columns, by the training forward.

    Args:
        model: Called with HF's arguments, returns ``.logits`` [B, S, V].
        ids: [B, S] int64. mask: [B, S] bool, False at padding.
        temperature: The one the tokens were sampled with.
        positions: Give ``position_ids`` that count real tokens only, as ``generate`` does.
    """
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if positions:
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, use_cache=False).logits[:, -new - 1 : -1].float() / temperature
    return -F.cross_entropy(logits.transpose(1, 2), ids[:, -new:], reduction="none")


def clipped_objective(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """Return the loss summed over tokens, and the number of clipped tokens.

    Args:
        log_probs, old: [B, T], now and when the update began. advantages: [B].
        mask: [B, T] bool, the sampled tokens.
        clip: The ratio counts up to ``1 ± clip``, on the side where it would gain.
    """
    ratio = (log_probs - old).exp()
    gain = advantages[:, None]
    held = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    clipped = (held < ratio * gain) & mask
    return -(held * mask).sum(), clipped.sum()
