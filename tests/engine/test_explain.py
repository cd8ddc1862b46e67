"""Claims about the report: the same as data and as a table, nothing left out."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from hybrid_fx.engine.explain import Explanation, LoraDecision
from hybrid_fx.passes.outcome import LayerReport, Missed

FUSED = ("concat_qkv", "residual_norm")


def layer(index: int, **changes: object) -> LayerReport:
    return replace(LayerReport(f"model.layers.{index}", "llama", FUSED), **changes)


def report(*layers: LayerReport, **changes: object) -> Explanation:
    given = {"layers": layers, "matched": len(layers), "total": len(layers), **changes}
    return Explanation(**given)  # type: ignore[arg-type]


def drawn(explanation: Explanation, *, sources: bool = False, width: int = 100) -> str:
    text = io.StringIO()
    explanation.render(Console(file=text, width=width, color_system=None), sources=sources)
    return text.getvalue()


def one_line(text: str) -> str:
    """The words of a drawing, without the rules between and around its cells."""
    return " ".join(text.translate(str.maketrans("", "", "│┃┏┡└━─┓┩┘├┤┼")).split())


def missed(node: str) -> tuple[Missed, ...]:
    return (Missed("fused_mlp", node, "Call[silu]", "gelu('tanh')"),)


def test_like_layers_in_a_row_share_a_row() -> None:
    text = str(report(*(layer(index) for index in range(24))))
    assert "model.layers.0-23" in text
    assert text.count("llama") == 1


def test_an_unlike_layer_stands_alone() -> None:
    layers = [layer(index) for index in range(6)]
    layers[3] = layer(3, policy=None, fused=())
    text = str(report(*layers, matched=5))
    for span in ("model.layers.0-2 ", "model.layers.3 ", "model.layers.4-5 "):
        assert span in text
    assert "none fits" in text
    assert "5 of 6 layers rewritten" in text


@pytest.mark.parametrize(
    "paths",
    [("model.layers.0", "model.layers.2"), ("encoder.0", "decoder.1"), ("block", "block")],
)
def test_only_consecutive_layers_of_one_stack_are_folded(paths: tuple[str, str]) -> None:
    text = str(report(*(LayerReport(path, "llama", FUSED) for path in paths)))
    assert text.count("llama") == 2


def test_a_missed_fusion_says_what_where_expected_and_found() -> None:
    text = one_line(str(report(layer(0, missed=missed("gelu_7")), matched=0)))
    assert "fused_mlp at gelu_7: expected" in text
    assert "Call[silu], found" in text
    assert "gelu('tanh')" in text


def test_folded_layers_with_one_reason_name_their_first_and_last_node() -> None:
    layers = [layer(index, missed=missed(f"gelu_{index}")) for index in range(3)]
    assert "gelu_0 … gelu_2" in one_line(str(report(*layers)))


def test_layers_with_different_reasons_are_not_folded() -> None:
    other = (Missed("fused_mlp", "relu", "Call[silu]", "relu"),)
    text = str(report(layer(0, missed=missed("gelu")), layer(1, missed=other)))
    assert "model.layers.0-1" not in text
    assert text.count("llama") == 2


def test_square_brackets_are_text_and_not_markup() -> None:
    reason = (Missed("fused_mlp", "n", "[red]Call[/red]", "[/x]"),)
    text = str(report(layer(0, missed=reason), notes=("[bold]kept[/bold]",), fallbacks={"[a]": 2}))
    for part in ("[red]Call[/red]", "[/x]", "[bold]kept[/bold]", "2 x [a]"):
        assert part in text


def test_memory_is_shown_for_people() -> None:
    explanation = report(
        layer(0),
        weight_bytes=2**30,
        prepared_bytes=2**29,
        prepare_peak_bytes=3 * 2**20,
        kv_bytes=2**10,
    )
    text = one_line(str(explanation))
    for part in (
        "weights 1.0 GiB",
        "prepared tensors 512.0 MiB",
        "peak of prepare 3.0 MiB",
        "KV workspace 1.0 KiB",
    ):
        assert part in text


def test_lora_decisions_are_counted_by_choice_with_the_worst_error() -> None:
    decisions = (
        LoraDecision("layers.0.q_proj", "fold", "auto", 0.01),
        LoraDecision("layers.1.q_proj", "fold", "auto", 0.04),
        LoraDecision("layers.2.q_proj", "side", "auto", 0.5),
        LoraDecision("layers.3.q_proj", "unfolded", "IA3"),
    )
    text = str(report(layer(0), lora=decisions))
    assert "LoRA fold: 2 modules (auto; largest relative error 4.00%)" in text
    assert "LoRA side: 1 modules (auto; largest relative error 50.00%)" in text
    assert "LoRA unfolded: 1 modules (IA3)" in text


def test_sources_are_printed_on_request_only() -> None:
    explanation = report(layer(0), sources={"decode": "def decode(x):\n    return x\n"})
    assert "def decode(x)" not in drawn(explanation)
    assert "def decode(x)" in drawn(explanation, sources=True)
    assert "def decode(x)" not in str(explanation)


def test_str_is_the_drawing_at_100_columns() -> None:
    explanation = report(*(layer(index) for index in range(3)), notes=("a note " * 40,))
    text = drawn(explanation)
    assert str(explanation) == "\n".join(line.rstrip() for line in text.splitlines())
    assert max(len(line) for line in str(explanation).splitlines()) <= 100


def test_a_report_without_layers_still_draws() -> None:
    assert "0 of 0 layers rewritten" in str(report(notes=("generates through transformers",)))


@pytest.mark.parametrize("width", [40, 60, 200])
def test_any_terminal_width_is_kept_and_no_word_cut_off(width: int) -> None:
    text = drawn(report(layer(0, missed=missed("gelu_7"))), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text


def test_the_data_is_plain_and_complete() -> None:
    explanation = report(
        layer(0, missed=missed("gelu")),
        lora=(LoraDecision("q", "fold", "auto", 0.1),),
        fallbacks={"beams": 1},
        sources={"decode": "x"},
        notes=("n",),
    )
    data = explanation.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert set(data) == set(Explanation.__dataclass_fields__)
    assert data["layers"][0]["missed"][0]["node"] == "gelu"
    assert data["lora"][0]["choice"] == "fold"
