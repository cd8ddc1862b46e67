"""The benchmarks run and say what they measured; how fast anything is, is no test's business."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_modules import loaded, started

TINY = (
    "--shape tiny --dtype float32 --batch 2 --prompt 6 --new 4 --repeat 1 --prompts 2 --samples 2 "
    "--prompt-tokens 5 --longest 6 --rows-at-once 2 --layers 1 --passes concat_qkv pack_weights "
    "--save"
).split()
WORKLOADS = ("decode", "grpo", "switch", "iteration", "passes", "soak")


def benchmark(*argv: str, script: str = "run.py") -> str:
    """What a script printed that ended well."""
    done = started(script, *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def records(folder: Path) -> dict[str, Any]:
    """Saved records by workload."""
    saved = (json.loads(path.read_text()) for path in folder.glob("*.json"))
    return {record["arguments"]["what"]: record for record in saved}


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
    assert {row["what"].split(" / ")[1] for row in found["grpo"]["rows"]} == {
        "processor",
        "lengths",
        "per_sequence",
    }
    assert all(row["a_tokens_s"] > 0 and row["b_tokens_s"] > 0 for row in found["grpo"]["rows"])
    assert [row["what"] for row in found["switch"]["rows"]] == [
        "none, the first, with capture",
        "none, later",
        "none, unchanged",
    ]
    parts = ["iteration", "rollout", "learn", "step"] * 2
    assert [row["what"] for row in found["iteration"]["rows"]] == parts


@pytest.mark.deep
def test_an_unknown_workload_is_refused_by_name() -> None:
    done = started("run.py", "decode", "speed")
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


PRETENDED = """
import types
__version__ = "0.0"

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        assert ignore_eos
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, *, model, dtype, max_model_len, skip_tokenizer_init, seed):
        print("what vLLM logs")

    def reset_prefix_cache(self):
        return True

    def generate(self, prompts, settings, *, use_tqdm):
        tokens = ([1] * each.max_tokens for each in settings)
        outputs = ([types.SimpleNamespace(token_ids=ids)] for ids in tokens)
        return [types.SimpleNamespace(outputs=each) for each in outputs]
"""


@pytest.mark.deep
def test_a_peer_in_its_own_process_is_measured_in_turn(tmp_path: Path) -> None:
    python = tmp_path / "peers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "vllm.py").write_text(PRETENDED)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "peers" / ".ready").write_text(loaded("environment").VLLM)
    where = ("--environment", str(tmp_path / "peers"), "--folder", str(tmp_path))
    benchmark("decode", "grpo", *TINY, *where, script="bench_peers.py")
    [path] = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["versions"]["vllm"] == "0.0"
    assert [row["what"].split(":")[0] for row in record["rows"]] == [
        "decode, batch 2",
        "grpo, processor",
        "grpo, lengths",
        "grpo, per_sequence",
    ]


@pytest.mark.deep
def test_each_way_to_run_the_graphs_can_be_asked_for() -> None:
    for graph in ("eager", "inductor", "cudagraphs"):
        assert "--graph {eager,inductor,cudagraphs}" in benchmark("--graph", graph, "--help")
