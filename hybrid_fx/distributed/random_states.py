"""Whose random numbers ranks draw: the option ``sync_rng`` of DeepSpeed engines.

Each rank draws for its own rows, in a team too: no forward needs equal states. Ranks that take
one over sample equal completions of equal prompts, which is what tensor parallelism promises
within a team, DeepSpeed's hybrid engine to all ranks, and what no data-parallel trainer wants.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

NAME = "sync_rng"

#: Which ranks take over one state when an engine is made: all, those of a team, or nobody.
CHOICES = ("all", "group", "none")

logger = logging.getLogger("hybrid_fx")


def without_choice(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` but ``sync_rng``, which is no option of a single process."""
    return {name: value for name, value in options.items() if name != NAME}


def choice_among(*options: Any, default: str) -> str:
    """What the first of ``options`` that says ``sync_rng`` says; else ``default``.

    Raises:
        ConfigError: for another value than the three.
    """
    stated = (held[NAME] for held in options if isinstance(held, Mapping) and NAME in held)
    choice = next(stated, default)
    if choice not in CHOICES:
        raise ConfigError(f"{NAME}={choice!r} is not known; use one of {', '.join(CHOICES)}")
    return str(choice)


def refuse_choice(*options: Any) -> None:
    """Refuse ``sync_rng`` for a model in one process.

    Raises:
        ConfigError: where any of ``options`` says it.
    """
    if any(isinstance(held, Mapping) and NAME in held for held in options):
        raise ConfigError(
            f"{NAME} is an option of DeepSpeed engines, whose ranks it gives one random state; a "
            "model that is none keeps its own: leave it out"
        )


def ranks_alike(choice: str, world: int, team: int) -> str:
    """Which ranks ``choice`` lets share a state, in words; "" where each keeps its own.

    Args:
        world: The ranks of the job.
        team: Those that compute one model together.
    """
    if choice == "all" and world > 1:
        return f"all {world} ranks take over the random state of rank 0"
    if choice == "group" and team > 1:
        return f"the {team} ranks of each team take over the random state of their first"
    return ""


def say_alike(who: str, choice: str) -> None:
    """Warn what a shared state means for sampling."""
    logger.warning(
        "%s (sync_rng=%r): those that are given equal prompts to sample from draw equal "
        'completions. Where these should differ, as in a group of GRPO, set "hybrid_fx": '
        '{"sync_rng": "none"} in the DeepSpeed config, or seed each rank apart after this',
        who,
        choice,
    )
