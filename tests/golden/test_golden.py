"""The generated sources of a few small models are, letter by letter, those that were kept."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping

import pytest
from golden_graphs import COMMAND, FOLDER, MODELS, golden_files

from hybrid_fx.plan.plan import SOURCES

NAMES = [f"{model}.{stage}.py.txt" for model in MODELS for stage in SOURCES]


@functools.cache
def _files() -> Mapping[str, str]:
    return golden_files()


def difference(kept: str, made: str, name: str) -> str:
    """A unified diff and what to do about it; "" where there is none."""
    lines = difflib.unified_diff(
        kept.splitlines(), made.splitlines(), f"kept {name}", "generated now", lineterm=""
    )
    text = "\n".join(lines)
    return f"{text}\n\nIf the change is wanted: {COMMAND}" if text or kept != made else ""


@pytest.mark.parametrize("name", NAMES)
def test_the_generated_source_is_the_one_that_was_kept(name: str) -> None:
    kept = (FOLDER / name).read_text()
    said = difference(kept, _files()[name], name)
    if said:
        pytest.fail(said, pytrace=False)


def test_every_golden_file_is_one_that_is_generated() -> None:
    assert sorted(file.name for file in FOLDER.glob("*.txt")) == sorted(NAMES)
    assert sorted(_files()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_names_the_command_that_writes_the_file(name: str) -> None:
    assert f"written by: {COMMAND}" in (FOLDER / name).read_text().split("\n\n")[0]


def test_a_difference_shows_both_lines_and_the_command() -> None:
    said = difference("a\nb\n", "a\nc\n", "some.txt")
    assert "-b\n+c" in said
    assert COMMAND in said
    assert difference("a\n", "a\n", "some.txt") == ""
