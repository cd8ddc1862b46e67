"""The mutants fit the source as it is, and the command finds what survives."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from mutant import Fault, Group, Mutant, StaleMutantError, mutants_of, mutated, stale
from mutants import MUTANTS
from mutation_command import ROOT, main
from mutation_worker import run_forked
from rich.console import Console

from hybrid_fx.passes.pipeline import PASSES


def test_every_mutant_fits_the_source_and_names_tests_that_are_there() -> None:
    found = list(stale(MUTANTS, ROOT))
    assert not found, "\n".join(found)


def test_every_pass_and_what_stands_around_them_is_broken_by_forty_mutants_and_more() -> None:
    parts = {mutant.part for mutant in MUTANTS}
    assert parts >= {*PASSES, "functionalize", "hoist", "emit", "attention", "workspace"}
    assert parts >= {"sessions", "weight versions", "prepared tensors"}
    assert len(MUTANTS) >= 40


def test_no_mutant_is_there_twice_and_each_says_what_it_is() -> None:
    changes = [(mutant.file, mutant.fault.old, mutant.fault.new) for mutant in MUTANTS]
    assert len({*changes}) == len(changes)
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_called_equivalent_is_justified() -> None:
    thin = [str(m) for m in MUTANTS if m.fault.equivalent and len(m.fault.equivalent.split()) < 12]
    assert not thin


_SOURCE = "def double(x):\n    y = 2 * x\n    return y\n\n\ndef same(x):\n    return x + 0\n"
_TEST = """
from small import double, same

def test_two_doubled_is_four():
    assert double(2) == 4

def test_same_is_a_number():
    assert same(1) is not None
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package of one module and its test."""
    (tmp_path / "small.py").write_text(_SOURCE)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_small.py").write_text(_TEST)
    return tmp_path


def faults(*given: Fault) -> list[Mutant]:
    return mutants_of((Group("arithmetic", "small.py", ("tests/test_small.py",), given),))


def command(project: Path, *given: Fault) -> tuple[int, str]:
    """Exit status and output of the command on a project."""
    out = io.StringIO()
    console = Console(file=out, width=120)
    code = main([], root=project, mutants=faults(*given), warm=(), console=console)
    return code, out.getvalue()


NOTICED = Fault("three instead of two", "2 * x", "3 * x")
UNNOTICED = Fault("one more", "x + 0", "x + 1")
HARMLESS = Fault("nothing is added", "x + 0", "x", (), "to add nothing changes no number at all")


def test_a_mutant_that_a_test_notices_is_shown_with_the_test(project: Path) -> None:
    code, said = command(project, NOTICED)
    assert code == 0
    assert "test_small.py::test_two_doubled_is_four" in said
    assert "1 killed" in said


def test_a_survivor_fails_the_command_and_the_tree_stays_as_it_was(project: Path) -> None:
    code, said = command(project, NOTICED, UNNOTICED)
    assert code == 1
    assert "survived: no test notices" in said
    assert (project / "small.py").read_text() == _SOURCE
    assert sorted(p.name for p in project.iterdir()) == ["small.py", "tests"]


def test_an_equivalent_mutant_passes_with_its_reason_and_one_that_is_noticed_fails(
    project: Path,
) -> None:
    code, said = command(project, HARMLESS)
    assert code == 0
    assert HARMLESS.equivalent in said
    wrong = Fault("three", "2 * x", "3 * x", (), "it is said that three is two in this place")
    assert command(project, wrong)[0] == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("of old", "4 * x", "5 * x"), "stands 0 times"),
        (Fault("of many", "return", "return not"), "stands 2 times"),
        (Fault("of none", "2 * x", "2 * x"), "changes nothing"),
        (Fault("of no sense", "2 * x", "2 *"), "no Python"),
    ],
)
def test_a_mutant_that_does_not_fit_is_an_error(project: Path, fault: Fault, said: str) -> None:
    with pytest.raises(StaleMutantError, match=said):
        mutated(faults(fault)[0], _SOURCE)
    code, out = command(project, fault)
    assert code == 2
    assert said in out


def test_tests_that_are_not_there_or_fail_without_a_mutant_are_an_error(project: Path) -> None:
    assert command(project, Fault("a", "2 * x", "3 * x", ("tests/test_none.py",)))[0] == 2
    assert command(project, Fault("a", "2 * x", "3 * x", ("tests/test_small.py::test_no",)))[0] == 2
    (project / "small.py").write_text(_SOURCE.replace("2 * x", "7 * x"))
    code, said = command(project, UNNOTICED)
    assert code == 2
    assert "fail without any mutant" in said


def test_a_mutant_that_cannot_be_imported_is_broken_and_not_killed(project: Path) -> None:
    code, said = command(project, Fault("a name", "def same(x):", "def other(x):"))
    assert code == 1
    assert "broken" in said


def test_tests_that_never_end_are_ended_and_count_as_noticed(tmp_path: Path) -> None:
    endless = tmp_path / "test_endless.py"
    endless.write_text("def test_waits():\n    while True:\n        pass\n")
    said = run_forked([str(endless)], 1.0, {})
    assert (said["code"], said["test"]) == (1, "no end within 1 s")
