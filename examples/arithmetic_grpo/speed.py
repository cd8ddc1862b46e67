"""How fast rollouts are: the engine and transformers take turns on the same prompts and seeds."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .rollout import PLAIN_SAMPLING, Sampler
from .task import Problem


@dataclass(frozen=True, slots=True)
class Speed:
    """Sampled tokens per second (median over the turns), and whether the tokens were the same."""

    engine: float
    transformers: float
    turns: int
    same_tokens: bool


def compare(
    engine: Any,
    sampler: Sampler,
    problems: Sequence[Problem],
    *,
    samples: int,
    temperature: float,
    turns: int,
    seed: int,
    report: Callable[[int], None],
) -> Speed:
    """Time ``turns`` rollouts each by the engine and by a plain copy of its model, alternating.

    Both sample with the same seed, so they do the same work: ``same_tokens`` says that they did.
    Each goes first in every second turn; one turn of each beforehand is not counted.
    """
    engine.eval()
    plain = copy.deepcopy(engine.module).eval()
    runners: list[tuple[str, Any]] = [("engine", engine), ("transformers", plain)]
    speeds: dict[str, list[float]] = {"engine": [], "transformers": []}
    same = True
    for turn in range(turns + 1):
        outputs = []
        for name, model in runners if turn % 2 else runners[::-1]:
            torch.manual_seed(seed + turn)
            rollout = sampler(
                model,
                problems,
                num_return_sequences=samples,
                temperature=temperature,
                **PLAIN_SAMPLING,
            )
            outputs.append(rollout.ids)
            if turn:
                speeds[name].append(rollout.tokens / rollout.seconds)
        same = same and torch.equal(*outputs)
        report(turn)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return Speed(medians["engine"], medians["transformers"], turns, same)
