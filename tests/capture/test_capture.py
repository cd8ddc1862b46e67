"""Capture: one graph of the cache-free forward, for every batch and length, in both modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_models import logits, named_tensors, run_graph, tokens
from captured_models import canonical, captured, decoder
from profiles import deep
from tiny_models import adapted, tiny
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from hybrid_fx.capture import capture
from hybrid_fx.capture.dynamo import trace
from hybrid_fx.errors import CaptureError
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.layers import layer_paths
from hybrid_fx.plan.build import normalize

KINDS = ("llama", "gpt2", "opt350", "qwen3", "neox", *deep("qwen2", "opt", "mistral", "phi3"))
SHAPES = ((1, 1), (1, 5), (3, 1), (7, 20))


@pytest.mark.parametrize("kind", KINDS)
def test_one_capture_serves_every_batch_and_length_without_a_difference(kind: str) -> None:
    model, graph = captured(kind)
    rewritten = canonical(kind)
    with torch.no_grad():
        for rows, length in SHAPES:
            ids, at = tokens(rows, length)
            wanted = logits(model, ids, at)
            got = run_graph(graph, named_tensors(model), ids, at)
            assert got.shape == wanted.shape
            assert torch.equal(got, wanted), f"{(got - wanted).abs().max():.1e} at {rows, length}"
            close = run_graph(rewritten, named_tensors(model), ids, at)
            assert torch.allclose(close, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_positions_are_an_input(kind: str) -> None:
    model, graph = captured(kind)
    ids, at = tokens(2, 6)
    with torch.no_grad():
        wanted = logits(model, ids, at + 5)
        assert torch.equal(run_graph(graph, named_tensors(model), ids, at + 5), wanted)
        assert not torch.allclose(wanted, logits(model, ids, at)) or kind == "llama"


def test_attention_arrives_as_one_operator_a_layer_in_its_module() -> None:
    graph = canonical("llama")
    found = calls(graph, "attention")
    paths = [node.meta["path"] for node in found]
    assert paths == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert layer_paths(graph) == ("model.layers.0", "model.layers.1")
    assert [node.args[4] for node in found] == [0, 0]
    windows = calls(canonical("mistral"), "attention")
    assert [node.args[4] for node in windows] == [4, 4]


def test_windows_that_alternate_arrive_layer_by_layer() -> None:
    found = calls(canonical("gemma3"), "attention")
    assert [node.args[4] for node in found] == [4, 4, 4, 4, 4, 0]


def test_a_training_capture_keeps_dropout_and_an_eval_capture_has_none() -> None:
    model = decoder("gpt2", attn_pdrop=0.25, resid_pdrop=0.1, embd_pdrop=0.1).train()
    held = [m.training for m in model.modules()]
    trained = capture(model, training=True)
    assert trained.training
    graph = normalize(trained.graph)
    assert len(calls(graph, "dropout")) == 5  # one for the embeddings, two a layer
    assert [node.args[7] for node in calls(graph, "attention")] == [0.25, 0.25]
    graph = normalize(capture(model).graph)
    assert not calls(graph, "dropout")
    assert all(node.args[7] == 0 for node in calls(graph, "attention"))
    assert [m.training for m in model.modules()] == held


def test_a_training_capture_has_the_gradients_of_the_module() -> None:
    model = decoder("llama", layers=1).train()
    graph = capture(model, training=True).graph
    ids, at = tokens(2, 5)
    logits(model, ids, at).square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    run_graph(graph, named_tensors(model), ids, at).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted[name], atol=1e-6), name


def test_flags_that_differ_from_module_to_module_come_back() -> None:
    model = decoder("llama", layers=1).train()
    model.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    capture(model)
    capture(model, training=True)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_weights_carry_their_names_and_ties_one_name() -> None:
    model, graph = captured("qwen2")
    names = [n.meta["weight"] for n in graph.nodes if "weight" in n.meta]
    assert len(names) == len(set(names))
    assert set(names) <= set(named_tensors(model))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    flags = {n.meta["weight"]: n.meta["parameter"] for n in graph.nodes if "weight" in n.meta}
    assert flags.pop("model.rotary_emb.inv_freq") is False
    assert all(flags.values())


def test_a_write_into_a_buffer_is_kept_though_nothing_reads_its_result() -> None:
    model = decoder("llama", layers=1)
    model.register_buffer("seen", torch.zeros(()))

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        module.seen.copy_(kwargs["position_ids"].sum())

    model.register_forward_pre_hook(count, with_kwargs=True)
    graph = normalize(capture(model).graph)
    ids, at = tokens(2, 6)
    with torch.no_grad():
        run_graph(graph, named_tensors(model), ids, at)
    assert float(model.seen) == 30.0


def test_hooks_that_edit_tensors_are_part_of_the_graph() -> None:
    model = decoder("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: out * 3.0)
    model.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] + 1.0, *args[1:]))
    graph = capture(model).graph
    ids, at = tokens(2, 6)
    with torch.no_grad():
        wanted = logits(model, ids, at)
        assert torch.equal(run_graph(graph, named_tensors(model), ids, at), wanted)


def test_hooks_that_ask_for_gradients_are_no_part_of_it_and_stay_in_their_places() -> None:
    model = tiny("llama")
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output * 2)
    model.enable_input_require_grads()
    embeddings.register_forward_hook(lambda module, args, output: output + 1)
    hooks = list(embeddings._forward_hooks.items())
    graph = capture(model).graph
    assert list(embeddings._forward_hooks.items()) == hooks
    ids, at = tokens(2, 5)
    with torch.no_grad():
        wanted = logits(model, ids, at)
    assert torch.equal(run_graph(graph, named_tensors(model), ids, at), wanted)
    model.disable_input_require_grads()
    assert list(embeddings._forward_hooks.items()) == [hooks[0], hooks[2]]


def _with_backward_hooks(model: Any) -> list[list[Any]]:
    """Hooks of each kind on modules of a llama model; those of all modules, in order."""
    layer, ran = model.model.layers[0], pytest.fail
    layer.mlp.register_full_backward_hook(lambda *given: ran("a backward hook"))
    layer.mlp.register_full_backward_hook(lambda *given: ran("another one"))
    layer.self_attn.q_proj.register_full_backward_pre_hook(lambda *given: ran("before it"))
    layer.input_layernorm.register_backward_hook(lambda *given: ran("one of the old kind"))
    return _backward_hooks(model)


def _backward_hooks(model: nn.Module) -> list[list[Any]]:
    modules = list(model.modules())
    hooks: list[Any] = [m._backward_hooks for m in modules]
    return [list(each.items()) for each in hooks + [m._backward_pre_hooks for m in modules]]


def test_backward_hooks_are_no_part_of_inference_and_stay_in_their_places() -> None:
    model = decoder("llama", layers=1)
    held = _with_backward_hooks(model)
    assert sum(map(bool, held)) == 3
    graph = capture(model).graph
    assert _backward_hooks(model) == held
    ids, at = tokens(2, 6)
    with torch.no_grad():
        wanted = logits(model, ids, at)
        assert torch.equal(run_graph(graph, named_tensors(model), ids, at), wanted)


def test_backward_hooks_stay_in_their_places_where_a_capture_fails() -> None:
    model = decoder("llama")
    held = _with_backward_hooks(model)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(CaptureError, match="without causality"):
        capture(model)
    assert _backward_hooks(model) == held


def test_a_training_capture_leaves_no_backward_hook_out() -> None:
    model = decoder("llama", layers=1).train()
    model.model.layers[0].mlp.register_full_backward_hook(lambda *given: None)
    with pytest.raises(CaptureError, match="could not be traced"):
        capture(model, training=True)


def test_a_hook_that_keeps_tensors_in_python_is_refused() -> None:
    model = decoder("llama", layers=1)
    kept: list[Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: kept.append(out))
    with pytest.raises(CaptureError, match="keeps 1 tensors beside the logits"):
        capture(model)
    assert not kept, "and a capture leaves nothing behind"
    handle.remove()
    capture(model)


def test_a_forward_that_stores_a_tensor_on_a_module_is_refused() -> None:
    model = decoder("llama", layers=1)

    def keep(module: Any, args: Any, out: Tensor) -> None:
        module.last = out

    model.model.norm.register_forward_hook(keep)
    with pytest.raises(CaptureError, match="keeps 1 tensors"):
        capture(model)
    assert not hasattr(model.model.norm, "last")


def test_adapters_are_captured_with_what_they_add() -> None:
    model = adapted(decoder("llama", layers=1))
    graph = capture(model).graph
    names = {n.meta["weight"] for n in graph.nodes if "weight" in n.meta}
    assert sum("lora_A" in name for name in names) == 7
    ids, at = tokens(2, 6)
    with torch.no_grad():
        wanted = logits(model, ids, at)
        assert torch.equal(run_graph(graph, named_tensors(model), ids, at), wanted)


def test_an_encoder_decoder_model_is_refused() -> None:
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(CaptureError, match="T5ForConditionalGeneration is an encoder-decoder"):
        capture(T5ForConditionalGeneration(config))


def test_chunked_attention_is_refused() -> None:
    model = decoder("llama", layers=1)
    model.config.attention_chunk_size = 4
    with pytest.raises(CaptureError, match="chunked attention"):
        capture(model)


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x)
    return result


class _Masked(nn.Module):
    """Attention that is given a mask besides causality."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        length = hidden_states.shape[1]
        mask = torch.zeros(1, 1, length, length)
        return self.attention(hidden_states, **{**kwargs, "attention_mask": mask})


def test_attention_with_a_mask_of_its_own_is_refused() -> None:
    model = decoder("llama", layers=1)
    model.model.layers[0].self_attn = _Masked(model.model.layers[0].self_attn)
    with pytest.raises(CaptureError, match="attends with a mask of its own"):
        capture(model)


def test_attention_that_is_not_causal_is_refused() -> None:
    model = decoder("llama")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(CaptureError, match="without causality"):
        capture(model)


def test_a_forward_that_reads_values_is_refused_and_says_why() -> None:
    model = decoder("llama", layers=1)

    def branch(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * 2 if float(out.sum()) > 0 else out

    model.model.layers[0].mlp.register_forward_hook(branch)
    with pytest.raises(CaptureError, match="could not be traced as one graph: "):
        capture(model)


def test_a_forward_that_fits_one_length_only_is_refused() -> None:
    model = decoder("llama", layers=1)
    fixed = torch.ones(9, 1)
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: out * fixed)
    with pytest.raises(CaptureError, match="could not be traced"):
        capture(model)


@pytest.mark.parametrize("kind", ["cpu_offload", "cpu_offload_with_hook"])
def test_an_offloaded_module_is_refused_by_its_name(kind: str) -> None:
    import accelerate

    model = decoder("llama")
    if kind == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(CaptureError, match=r"^lm_head is offloaded|^model\..* is offloaded"):
            capture(model)
    else:
        accelerate.cpu_offload_with_hook(model, execution_device="cpu")
        with pytest.raises(CaptureError, match="the model is offloaded"):
            capture(model)


def test_a_model_on_the_meta_device_is_refused() -> None:
    model = decoder("llama").to("meta")
    with pytest.raises(CaptureError, match=r"embed_tokens.weight is on the meta device"):
        capture(model)


def test_two_models_in_one_process_do_not_see_each_other() -> None:
    """Constants of one are not taken for inputs of the next."""
    for eps in (1e-6, 1e-3):
        model = tiny("llama", layers=1, rms_norm_eps=eps)
        graph = normalize(capture(model).graph)
        assert {n.args[1] for n in calls(graph, "add") if n.args[1] == eps} == {eps}


def test_captures_do_not_disturb_a_compiled_function_of_the_user() -> None:
    counts: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        counts.append(1)
        return module.forward

    layer = nn.Linear(4, 4)

    @torch.compile(backend=backend)
    def mine(x: Tensor) -> Tensor:
        return layer(x).relu()

    before = mine(torch.ones(2, 4))
    capture(tiny("gpt2", layers=1))
    assert torch.equal(mine(torch.ones(2, 4)), before)
    assert counts == [1], "the user's function was not compiled again"


def test_one_piece_of_code_can_be_traced_more_often_than_dynamo_compiles_it_anew() -> None:
    for size in range(1, 21):
        layer = nn.Linear(size, size, dtype=torch.float64)
        traced = trace(_apply, layer, torch.ones(2, size, dtype=torch.float64))
        assert len(traced.arguments) == 3


def test_a_model_that_is_compiled_itself_still_captures_and_stays_compiled() -> None:
    model = decoder("llama", layers=1)
    compiled: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(1)
        return module.forward

    forward = torch.compile(model.model.layers[0].mlp, backend=backend)
    x = torch.randn(1, 2, 32)
    with torch.no_grad():
        before = forward(x)
        capture(model)
        assert torch.equal(forward(x), before)
    assert compiled == [1]


def test_nothing_of_the_values_is_read_by_a_capture() -> None:
    """Capture of weights that are not numbers: it looks at shapes only."""
    model = decoder("llama", layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    state = torch.get_rng_state()
    graph = capture(model).graph
    assert torch.equal(torch.get_rng_state(), state)
    assert calls(normalize(graph), "attention")
