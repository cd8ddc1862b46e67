"""Measurements on the disk: read for the very machine, and only if nobody else wrote them."""

from __future__ import annotations

import json
import logging
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hybrid_fx.cache.machine import Machine, file_of, read_seconds, write_seconds

SECONDS = {"bfloat16": [1.0, 2.0], "plain": [0.5, 3.0]}
WHAT = "products-bfloat16"


@pytest.fixture
def here() -> Machine:
    return Machine.here()


@pytest.fixture
def kept(tmp_path: Path, here: Machine) -> Path:
    """The file of measurements that were written well."""
    directory = tmp_path / "cache"
    write_seconds(directory, here, WHAT, SECONDS)
    return file_of(directory, here, WHAT)


def test_what_is_written_is_read_in_a_directory_of_the_users_own(kept: Path, here: Machine) -> None:
    assert read_seconds(kept.parent, here, WHAT) == SECONDS
    assert read_seconds(kept.parent, here, "products-float32") is None
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize("field", [field.name for field in fields(Machine)])
def test_another_machine_has_a_file_of_its_own(field: str, kept: Path, here: Machine) -> None:
    old = getattr(here, field)
    new = {str: "other", bool: not old, int: 99, tuple: (("ONEDNN_MAX_CPU_ISA", "other"),)}
    other = replace(here, **{field: new[type(old)]})
    assert file_of(kept.parent, other, WHAT) != kept
    assert read_seconds(kept.parent, other, WHAT) is None


def test_what_the_libraries_are_told_counts_and_what_they_print_does_not(
    here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_VERBOSE", "0")
    assert Machine.here() == here
    for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.setenv(name, "other")
        assert (name, "other") in Machine.here().variables


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "[1]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "machine": {}, "seconds": {"plain": [1.0]}}',
    ],
)
def test_a_damaged_file_is_said_and_not_used(
    content: str, kept: Path, here: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    kept.write_text(content)
    with caplog.at_level(logging.WARNING, "hybrid_fx"):
        assert read_seconds(kept.parent, here, WHAT) is None
    assert "measured again" in caplog.text


@pytest.mark.parametrize("bad", [{"plain": [-1.0]}, {"plain": ["1"]}, {"plain": 1.0}, [], None])
def test_what_is_no_seconds_is_not_used(bad: object, kept: Path, here: Machine) -> None:
    value = json.loads(kept.read_text())
    kept.write_text(json.dumps(value | {"seconds": bad}))
    assert read_seconds(kept.parent, here, WHAT) is None


def test_a_file_or_directory_that_others_may_write_is_not_used(kept: Path, here: Machine) -> None:
    kept.chmod(0o666)
    assert read_seconds(kept.parent, here, WHAT) is None
    kept.chmod(0o600)
    assert read_seconds(kept.parent, here, WHAT) == SECONDS
    kept.parent.chmod(0o777)
    assert read_seconds(kept.parent, here, WHAT) is None
    before = kept.read_text()
    write_seconds(kept.parent, here, WHAT, {"plain": [9.0]})
    assert kept.read_text() == before
