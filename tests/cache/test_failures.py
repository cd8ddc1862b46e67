"""Why a structure has no plan is stored as plans are, and beside them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid_fx.cache.plan_cache import PlanCache
from hybrid_fx.errors import CacheError
from hybrid_fx.plan.failure import MOST, Failure

DIGEST = "ab" * 32
FAILURE = Failure(reason="a branch on s0 < 16", guards={"default dtype": "torch.float32"})


def cache_in(folder: Path | None) -> PlanCache:
    return PlanCache(folder, operator_names=())


def stored(folder: Path) -> Path:
    cache_in(folder).put_failure(DIGEST, FAILURE, on_disk=True)
    (file,) = folder.iterdir()
    return file


def test_a_failure_is_read_back_by_another_cache_with_its_file(tmp_path) -> None:
    file = stored(tmp_path / "plans")
    assert cache_in(file.parent).get_failure(DIGEST) == (FAILURE, file)
    assert file.stat().st_mode & 0o077 == 0
    assert cache_in(file.parent).get_failure("cd" * 32) is None


def test_what_is_kept_in_memory_alone_writes_nothing(tmp_path) -> None:
    cache = cache_in(tmp_path / "plans")
    cache.put_failure(DIGEST, FAILURE, on_disk=False)
    assert cache.get_failure(DIGEST) == (FAILURE, None)
    assert list(tmp_path.iterdir()) == []
    without = cache_in(None)
    without.put_failure(DIGEST, FAILURE, on_disk=True)
    assert without.get_failure(DIGEST) == (FAILURE, None)


def test_a_failure_is_no_plan_and_a_plan_no_failure(tmp_path) -> None:
    file = stored(tmp_path)
    with pytest.warns(RuntimeWarning, match="not the fields of a stored plan"):
        assert cache_in(tmp_path).get(DIGEST) is None
    file.write_text(file.read_text().replace('"failure"', '"plan"'))
    with pytest.warns(RuntimeWarning, match="stored failure .* is not used"):
        assert cache_in(tmp_path).get_failure(DIGEST) is None


def edited(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        value = json.loads(file.read_text())
        edit(value)
        file.write_text(json.dumps(value))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.chmod(0o666),
        edited(lambda value: value["failure"].update(reason="another")),
        edited(lambda value: value.update(key="cd" * 32)),
        edited(lambda value: value.update(format=0)),
    ],
    ids=["empty", "others may write", "changed", "of another key", "another format"],
)
def test_a_file_that_is_no_failure_is_one_warning_and_a_miss(tmp_path, spoil) -> None:
    file = stored(tmp_path)
    spoil(file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cache_in(tmp_path).get_failure(DIGEST) is None
    assert len(caught) == 1
    assert "is not used" in str(caught[0].message)


@pytest.mark.parametrize("fields", [{"reason": 3}, {"guards": None}, {"guards": {"x": object()}}])
def test_a_failure_holds_plain_values(fields: dict[str, Any]) -> None:
    with pytest.raises(CacheError):
        Failure(**{"reason": "", "guards": {}, **fields})


def test_a_long_reason_is_cut() -> None:
    assert len(Failure(reason="x" * 5 * MOST, guards={}).reason) == MOST
