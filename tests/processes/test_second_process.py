"""A second process takes the plans that the first one stored, or makes its own; never wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from processes.fresh_process import CASES, finish, model_of, plans_in, run_case, start
from tiny_models import prompt, tiny

import hybrid_fx
from hybrid_fx.cache.key import StructureKey

ROOT = Path(hybrid_fx.__file__).resolve().parent.parent


def tokens_of_transformers(case: str) -> list[list[int]]:
    return model_of(case).generate(**prompt((5, 3)), max_new_tokens=8, do_sample=False).tolist()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Plans of every case, stored by this process, and what it generated."""
    folder = tmp_path_factory.mktemp("plans")
    return folder, {case: run_case(case, str(folder)) for case in CASES}


def copied_package(folder: Path, change: str = "") -> Path:
    """A copy of the package as it is installed, a text added to the source of one pass."""
    skip = shutil.ignore_patterns("__pycache__", "passes")
    shutil.copytree(ROOT / "hybrid_fx", folder / "hybrid_fx", ignore=skip)
    passes = Path(hybrid_fx.passes.__file__).resolve().parent
    shutil.copytree(passes, folder / "hybrid_fx" / "passes", ignore=skip)
    source = folder / "hybrid_fx" / "passes" / "fuse_norm.py"
    source.write_text(source.read_text() + change)
    return folder


def test_a_second_process_does_not_trace_and_gives_the_same_tokens(stored, tmp_path):
    folder, first = stored
    files = {file.name: file.read_bytes() for file in plans_in(folder)}
    package = copied_package(tmp_path)
    second = finish(start(list(CASES), folder, may_trace=False, package=package))
    for case in CASES:
        assert first[case]["counters"]["captures"] == 1
        counters = second[case]["counters"]
        assert counters["captures"] == 0
        assert counters["cache_hits_disk"] == (2 if case == "side" else 1)
        assert second[case]["tokens"] == first[case]["tokens"]
        assert second[case]["fallbacks"] == {}
        assert second[case]["warnings"] == []
        assert second[case]["lora"] == first[case]["lora"]
    assert files == {file.name: file.read_bytes() for file in plans_in(folder)}


def test_a_changed_pass_makes_stored_plans_a_miss(stored, tmp_path):
    folder, first = stored
    plans = tmp_path / "plans"
    shutil.copytree(folder, plans)
    package = copied_package(tmp_path / "package", change="\n# another rule\n")
    run = finish(start(["llama"], plans, package=package))["llama"]
    assert run["counters"]["captures"] == 1
    assert run["counters"]["cache_hits_disk"] == 0
    assert run["tokens"] == first["llama"]["tokens"]
    assert len(plans_in(plans)) == len(plans_in(folder)) + 1


def test_the_cases_mean_what_they_say(stored):
    _, first = stored
    assert set(first["fold"]["lora"].values()) == {"fold"}
    assert "side" in first["side"]["lora"].values()
    for case in ("llama", "gpt2", "fold"):
        assert first[case]["tokens"] == tokens_of_transformers(case)


def test_models_built_before_do_not_change_a_key():
    config = hybrid_fx.HybridConfig()
    before = StructureKey.of(tiny("qwen2"), config)
    tiny("opt")
    assert StructureKey.of(tiny("qwen2"), config).differs(before) == ()


def test_two_processes_at_once_on_one_empty_folder_are_both_right(tmp_path):
    children = [start(["llama"], tmp_path / "plans") for _ in range(2)]
    wanted = tokens_of_transformers("llama")
    for child in children:
        seen = finish(child)["llama"]
        assert seen["tokens"] == wanted
        assert seen["warnings"] == []
        assert seen["fallbacks"] == {}
    assert [file.suffix for file in plans_in(tmp_path / "plans")] == [".json"]
    third = run_case("llama", str(tmp_path / "plans"))
    assert third["counters"]["captures"] == 0
    assert third["tokens"] == wanted
