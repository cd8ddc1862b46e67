"""What the ranks of a team must ask a generate for alike, and how differences are found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NoReturn

import torch

from ..errors import InputError
from .lockstep import Lockstep


def digest_of(settings: Mapping[str, str]) -> int:
    """A number of 56 bits that stands for ``settings``."""
    return int.from_bytes(hashlib.sha256(_text(settings)).digest()[:7])


def _text(settings: Mapping[str, str]) -> bytes:
    return json.dumps(dict(settings), sort_keys=True).encode()


def tell_apart(settings: Mapping[str, str], ranks: Lockstep, device: torch.device) -> NoReturn:
    """Say on each rank in which field the ranks differ. Collective.

    Raises:
        InputError: always, naming fields, ranks and values.
    """
    text = _text(settings)
    counts = [words[0] for words in ranks.step(len(text)) if words is not None]
    parts = ranks.share(torch.tensor([*text], device=device), counts)
    said = [json.loads(bytes(part.tolist())) for part in parts]
    names = sorted({name for each in said for name in each})
    lines = []
    for name in names:
        values = [each.get(name, "nothing") for each in said]
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            lines.append(
                f"{name} is {values[0]} on rank {ranks.name(0)} and {values[other]} on rank "
                f"{ranks.name(other)}"
            )
    raise InputError(
        "ranks that generate together (hybrid_engine.inference_tp_size) were asked for different "
        f"things: {'; '.join(lines)}. Give each of them the same options; prompts and lengths may "
        "differ"
    )
