"""What a mutant is, and how one is put into a tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


class StaleMutantError(ValueError):
    """A mutant does not fit the source any more; the message says what to do."""


@dataclass(frozen=True)
class Fault:
    """One mistake: ``old`` stands exactly once in the file and becomes ``new``.

    Attributes:
        what: The mistake, as one would say it in a review.
        tests: What should notice, where not the tests of the group: files, or tests in them.
        equivalent: Why no test can notice; "" where one does.
    """

    what: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""


@dataclass(frozen=True)
class Group:
    """Faults of one part (a pass by its name, or what stands around the passes) in one file."""

    part: str
    file: str
    tests: tuple[str, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Mutant:
    """One fault with all that is needed to run it."""

    part: str
    file: str
    fault: Fault
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.part}: {self.fault.what}"


def mutants_of(groups: Sequence[Group]) -> list[Mutant]:
    """Every mutant, in order."""
    return [
        Mutant(group.part, group.file, fault, fault.tests or group.tests)
        for group in groups
        for fault in group.faults
    ]


def mutated(mutant: Mutant, text: str) -> str:
    """``text`` with the fault in it.

    Raises:
        StaleMutantError: where the old text does not stand there exactly once, or nothing changes,
            or what comes out is no Python.
    """
    fault = mutant.fault
    if (found := text.count(fault.old)) != 1:
        raise StaleMutantError(
            f"{mutant}: the old text stands {found} times in {mutant.file}, and must once; "
            "write the mutant anew for the source as it is"
        )
    new = text.replace(fault.old, fault.new)
    if new == text:
        raise StaleMutantError(f"{mutant}: the mutant changes nothing")
    try:
        ast.parse(new)
    except SyntaxError as error:
        raise StaleMutantError(f"{mutant}: line {error.lineno} is no Python any more") from error
    return new


def stale(mutants: Sequence[Mutant], root: Path) -> Iterator[str]:
    """What keeps mutants from being run on the tree ``root``."""
    for mutant in mutants:
        try:
            mutated(mutant, (root / mutant.file).read_text())
        except (StaleMutantError, OSError) as error:
            yield str(error)
        for test in mutant.tests:
            file, _, name = test.partition("::")
            path = root / file
            if not path.is_file():
                yield f"{mutant}: there is no {file}"
            elif name and f"def {name.partition('[')[0]}(" not in path.read_text():
                yield f"{mutant}: there is no {name} in {file}"
