"""The task: add two numbers place by place. Its reward needs no judge but arithmetic.

A solution writes the sums of the places first, then the total: ``17+25=`` continues with
``30+12=42``. Only the total is rewarded; how the model gets there is its own business.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

#: Shown before each prompt to a pretrained model, which has never seen our notation.
EXAMPLES = ((36, 48), (71, 15), (59, 67))

NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Problem:
    """One addition.

    Attributes:
        prompt: What the model reads, ``"17+25="``.
        solution: One way to write it out, ``"30+12=42"``; only the warm-up looks at it.
        answer: The number the reward asks for, ``42``.
    """

    prompt: str
    solution: str
    answer: int


@dataclass(frozen=True, slots=True)
class Problems:
    """Three disjoint sets: to train on, to decide when the warm-up ends, and to report."""

    train: tuple[Problem, ...]
    probe: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def write_out(left: int, right: int) -> Problem:
    """Return ``left + right`` as a problem."""
    places = [10**k for k in reversed(range(len(str(max(left, right)))))]
    sums = [(left // place % 10 + right // place % 10) * place for place in places]
    total = left + right
    solution = "+".join(map(str, sums)) + f"={total}" if len(sums) > 1 else str(total)
    return Problem(f"{left}+{right}=", solution, total)


def make_problems(*, digits: int, held_out: int, probe: int, seed: int) -> Problems:
    """Draw distinct problems with operands below ``10**digits``; at most 20,000 to train on.

    Raises:
        ValueError: if ``held_out + probe`` leaves fewer than a fifth of all problems to train on.
    """
    count = 10**digits
    apart = held_out + probe
    if apart > count * count * 4 // 5:
        raise ValueError(
            f"{apart} problems kept apart leave too few of the {count * count} with {digits} "
            "digit(s); ask for fewer held-out problems or for more digits"
        )
    chosen = random.Random(seed).sample(range(count * count), min(count * count, apart + 20_000))
    drawn = tuple(write_out(*divmod(index, count)) for index in chosen)
    return Problems(drawn[apart:], drawn[held_out:apart], drawn[:held_out])


def few_shot_prefix() -> str:
    """Return worked examples, one a line, ending in a newline."""
    worked = (write_out(left, right) for left, right in EXAMPLES)
    return "".join(f"{problem.prompt}{problem.solution}\n" for problem in worked)


def reward(completion: str, answer: int) -> float:
    """Return 1.0 if the last number of the completion's first line is ``answer``, else 0.0."""
    lines = completion.strip().splitlines()
    numbers = NUMBER.findall(lines[0]) if lines else []
    return float(bool(numbers) and (numbers[-1].lstrip("0") or "0") == str(answer))
