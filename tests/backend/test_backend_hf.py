"""transformers models through the backend, against the same models in eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_models import compiled, equal, gradients, rewritten
from tiny_models import adapted, prompt, tiny
from torch import Tensor

#: Kind -> the operators of its inference and of its training graphs.
FUSED: dict[str, tuple[set[str], set[str]]] = {
    "llama": (
        {"add_rms_norm", "rms_norm", "split_gated_mlp"},
        {"add_rms_norm", "rms_norm"},
    ),
    "gemma2": (  # norms whose weights are computed, 1 + w, behind the sum that is normed
        {"add_rms_norm", "rms_norm", "split_gated_mlp"},
        {"add_rms_norm", "rms_norm"},
    ),
    "gpt2": ({"add_layer_norm", "plain_mlp"}, {"add_layer_norm"}),
    "opt350": ({"add_layer_norm", "plain_mlp"}, {"add_layer_norm"}),
}
IDS = prompt([5, 5])["input_ids"]


def _loss(model: Any, run: Any) -> dict[str, Tensor]:
    return gradients(model, lambda: run(input_ids=IDS, labels=IDS, use_cache=False).loss)


def _unrewritten(model: Any) -> dict[str, Tensor]:
    """Gradients of Dynamo's graphs as they are: tracing picks another way through SDPA, which
    differs from the module in the last bit. They are close to the module's."""
    torch._dynamo.reset()
    found, module = _loss(model, torch.compile(model, backend="eager")), _loss(model, model)
    assert found.keys() == module.keys()
    for name, gradient in module.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    return found


@pytest.mark.parametrize("kind", FUSED)
def test_logits_and_every_gradient_are_those_of_eager(kind: str) -> None:
    model = tiny(kind)
    fast, reports = compiled(model)
    with torch.no_grad():
        got, wanted = (run(input_ids=IDS, use_cache=False).logits for run in (fast, model))
    if kind == "gpt2":  # addmm on transposed weights against linear: another order of summation
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)
    else:
        assert torch.equal(got, wanted), "bit by bit"
    model.train()
    assert equal(_loss(model, fast), _unrewritten(model)), "bit by bit, dropout included"
    inference, training = rewritten(reports)[:2]
    assert (inference.mode, training.mode) == ("inference", "training")
    for report, operators in zip((inference, training), FUSED[kind], strict=True):
        for layer in report.layers:
            assert set(layer.fused) <= operators
            assert layer.policy
            assert not layer.missed
        assert set().union(*(layer.fused for layer in report.layers)) == operators


def test_an_adapter_trains_through_the_backend_as_it_does_without() -> None:
    model = adapted(tiny("llama", layers=1))
    fast, reports = compiled(model)
    model.train()
    assert equal(_loss(model, fast), _unrewritten(model))
    assert rewritten(reports)


def test_weights_folded_and_stacked_in_the_graph_follow_every_change() -> None:
    model = adapted(tiny("llama", layers=1))
    passes = ("fuse_rms_norm", "fold_lora", "concat_qkv", "concat_gate_up", "fuse_mlp")
    fast, reports = compiled(model, passes=passes)
    with torch.no_grad():
        for _ in range(2):
            got, wanted = (run(input_ids=IDS, use_cache=False).logits for run in (fast, model))
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
            for parameter in model.parameters():
                parameter.data.mul_(1.1)  # what no version counter sees
    (report,) = rewritten(reports)
    assert {name for name, count in report.passes.items() if count} == set(passes)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_gives_the_same_tokens_with_its_own_caches(kind: str, cache: str | None) -> None:
    model, given = tiny(kind), prompt([5, 3])
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    wanted: Tensor = model.generate(**given, **options)
    model.forward, reports = compiled(model.forward)
    assert torch.equal(model.generate(**given, **options), wanted)
    graphs = len(rewritten(reports))
    assert graphs == len(reports)
    assert torch.equal(model.generate(**given, **options), wanted)
    assert len(reports) == graphs, "a second generate compiles nothing"


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_that_change_compile_as_often_as_without_passes(dynamic: bool | None) -> None:
    model = tiny("llama", layers=1)
    sizes = ((2, 5), (3, 7), (4, 9), (5, 5), (9, 4))
    fast, reports = compiled(model, dynamic=dynamic)
    with torch.no_grad():
        for rows, length in sizes:
            ids = torch.randint(3, 60, (rows, length))
            wanted = model(input_ids=ids, use_cache=False).logits
            assert torch.equal(fast(input_ids=ids, use_cache=False).logits, wanted)
        plain: list[int] = []

        def count(gm: Any, _: Any) -> Any:
            plain.append(1)
            return gm

        torch._dynamo.reset()
        other = torch.compile(model, backend=count, dynamic=dynamic)
        for rows, length in sizes:
            other(input_ids=torch.randint(3, 60, (rows, length)), use_cache=False)
    assert len(rewritten(reports)) == len(plain)


def test_a_size_that_is_marked_dynamic_stays_so() -> None:
    model = tiny("llama", layers=1)
    fast, reports = compiled(model, fullgraph=True)
    ids = IDS.clone()
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(ids, dim)
    with torch.no_grad():
        fast(input_ids=ids, use_cache=False)
        for shape in ((3, 7), (7, 7), (4, 2)):
            more = torch.randint(3, 60, shape)
            wanted = model(input_ids=more, use_cache=False).logits
            assert torch.equal(fast(input_ids=more, use_cache=False).logits, wanted)
    assert len(rewritten(reports)) == 1


def test_autocast_around_the_call_is_honoured() -> None:
    model = tiny("llama", layers=1)
    fast, reports = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, wanted = (run(input_ids=IDS, use_cache=False).logits for run in (fast, model))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)
    assert rewritten(reports)


def test_a_graph_break_in_each_layer_leaves_parts_that_are_rewritten() -> None:
    model = tiny("llama", layers=1)
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: torch._dynamo.graph_break()
    )
    fast, reports = compiled(model)
    with torch.no_grad():
        got, wanted = (run(input_ids=IDS, use_cache=False).logits for run in (fast, model))
    assert torch.equal(got, wanted)
    assert len(reports) > 1
    assert rewritten(reports)


def test_after_one_cycle_of_training_and_generation_nothing_is_compiled_again() -> None:
    model, given = tiny("llama", layers=1), prompt([5, 3])
    fast, reports = compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(6):
        model.train()
        fast(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            assert torch.equal(fast(**given).logits, model(**given).logits), "with the new weights"
        seen.append(len(reports))
    assert seen == [seen[0]] * 6
    assert {report.mode for report in rewritten(reports)} == {"training", "inference"}


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.deep)])
def test_inner_backends_of_torch_train_and_infer(inner: str) -> None:
    model = tiny("llama", layers=1)
    fast, reports = compiled(model, inner=inner)
    with torch.no_grad():
        got, wanted = (run(input_ids=IDS, use_cache=False).logits for run in (fast, model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    one, other = _loss(model, fast), _loss(model, model)
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert len(rewritten(reports)) == 2
