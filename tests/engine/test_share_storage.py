"""``share_storage=True``: stacked weights lie in one buffer, and nobody else can tell."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PAD, VOCAB, adapted, prompt, randomize_adapters, reweigh, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hybrid_fx

CALL = prompt((5, 3), 2) | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}


#: Stacks that are packed are copied out of the weights all the same.
PLAIN = {"disable_passes": ("pack_weights",)}


def shared(model: Any, **options: Any) -> Any:
    """An engine that has generated once, on shared stacks."""
    engine = hybrid_fx.hybridize(model, share_storage=True, **PLAIN | options)
    same_tokens(engine)
    return engine


def same_tokens(engine: Any) -> None:
    assert torch.equal(engine.generate(**CALL), engine._plain_generate(**CALL))
    assert engine.stats.fallbacks == {}
    assert engine.stats.counters["hf_forwards"] % CALL["max_new_tokens"] == 0


def in_stacks(model: nn.Module) -> list[str]:
    """The parameters that lie in front of or behind another of their module, without a gap."""
    found = []
    for path, module in model.named_modules():
        own = {f"{path}.{n}": p for n, p in module.named_parameters() if n.count(".") == 1}
        ends = {p.data_ptr() + p.nbytes for p in own.values()}
        starts = {p.data_ptr() for p in own.values()}
        found += [
            name
            for name, p in own.items()
            if p.data_ptr() in ends or p.data_ptr() + p.nbytes in starts
        ]
    return sorted(found)


def train(model: Any, optimizer: Any, step: int) -> None:
    ids = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(step))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same_state(model: nn.Module, optimizer: Any, other: nn.Module, other_opt: Any) -> None:
    for (name, one), (_, two) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    states = optimizer.state_dict()["state"], other_opt.state_dict()["state"]
    assert states[0].keys() == states[1].keys() != set()
    for key, state in states[0].items():
        for what, value in state.items():
            assert torch.equal(value, states[1][key][what]), (key, what)


@pytest.mark.parametrize("kind", ["llama", "qwen2", pytest.param("opt", marks=pytest.mark.deep)])
def test_nothing_is_copied_where_weights_share_their_stacks(kind: str) -> None:
    model = tiny(kind)
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    with shared(model) as engine:
        report = engine.explain()
        assert report.prepared_bytes == engine.stats.prepared_bytes == 0
        assert report.copies == ()
        assert report.eval_bytes == report.kv_bytes == engine.stats.kv_bytes > 0
        names = [name for name in in_stacks(model) if "k_proj.weight" in name]
        assert len(names) == 2
        assert report.shared_bytes > 0
        assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
        assert engine.weight_version == 0, "laying out is no change of weights"
        assert engine.stats.counters["prepares"] == 1
        same_tokens(engine)
        assert engine.stats.counters["prepares"] == 1
        reweigh(model, 3)
        same_tokens(engine)
        assert engine.stats.counters["prepares"] == 2
    assert in_stacks(model) == []


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("phi3", marks=pytest.mark.deep)])
def test_weights_that_are_one_already_stay_where_they_are(kind: str) -> None:
    model = tiny(kind)
    before = [p.data_ptr() for p in model.parameters()]
    with shared(model) as engine:
        report = engine.explain()
        assert (report.prepared_bytes, report.shared_bytes, report.copies) == (0, 0, ())
        assert [p.data_ptr() for p in model.parameters()] == before


def test_without_the_option_nothing_is_moved_and_the_report_says_what_is_copied() -> None:
    model = tiny("llama")
    before = [p.data_ptr() for p in model.parameters()]
    with hybrid_fx.hybridize(model, **PLAIN) as engine:
        engine.generate(**CALL)
        report = engine.explain()
        assert [p.data_ptr() for p in model.parameters()] == before
        assert {copy.reason for copy in report.copies} == {"share_storage=False"}
        assert sum(copy.nbytes for copy in report.copies) == report.prepared_bytes > 0
        text = " ".join(str(report).split())
        assert "(share_storage=False): model.layers.0-1.self_attn.concat_rows" in text


def test_what_a_device_does_not_pack_is_not_called_packed() -> None:
    with hybrid_fx.hybridize(tiny("llama").double()) as engine:
        engine.generate(**CALL)
        reasons = {copy.reason for copy in engine.explain().copies}
        assert "share_storage=False" in reasons
        assert not any("pack" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ({"foreach": True}, torch.float32),
        ({"fused": True}, torch.float32),
        ({"foreach": False}, torch.float32),
        ({"fused": True}, torch.bfloat16),
    ],
    ids=["foreach", "fused", "one by one", "fused bfloat16"],
)
def test_training_is_bit_identical_to_a_twin_that_never_generates(
    option: dict[str, bool], dtype: torch.dtype
) -> None:
    model = tiny("qwen2", dtype=dtype)
    twin = copy.deepcopy(model)
    optimizer, other = (
        torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1, **option)
        for m in (model, twin)
    )
    train(model, optimizer, 0)
    train(twin, other, 0)
    with hybrid_fx.hybridize(model, share_storage=True, **PLAIN) as engine:
        for step in range(1, 5):
            engine.eval()
            engine.generate(**CALL)
            engine.train()
            twin.train()
            assert engine.explain().shared_bytes > 0
            if step == 3:  # resumed in the middle, from what was saved
                for one in (optimizer, other):
                    one.load_state_dict(copy.deepcopy(one.state_dict()))
                model.load_state_dict(copy.deepcopy(model.state_dict()))
            train(model, optimizer, step)
            train(twin, other, step)
            assert_same_state(model, optimizer, twin, other)
        same_tokens(engine)
        assert engine.explain().shared_bytes > 0
    train(model, optimizer, 9)
    train(twin, other, 9)
    assert_same_state(model, optimizer, twin, other)


def test_gradient_checkpointing_hooks_and_ties_are_what_they_were() -> None:
    model = tiny("qwen2")  # embedding and head are tied
    twin = copy.deepcopy(model)
    seen: list[Tensor] = []
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.register_hook(seen.append)
    with shared(model):
        for one in (model, twin):
            one.train()
            one.gradient_checkpointing_enable()
            train(one, torch.optim.AdamW(one.parameters(), lr=1e-2, fused=True), 1)
        assert len(seen) == 1
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, two)


def test_the_next_generate_sees_what_a_fused_step_wrote() -> None:
    model = tiny("llama")
    with shared(model) as engine:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
        for step in range(2):
            train(model, optimizer, step)
            same_tokens(engine)


def size(write: Any, value: Any) -> int:
    held = io.BytesIO()
    write(value, held)
    return len(held.getvalue())


def test_files_are_as_large_as_those_of_the_plain_model(tmp_path: Path) -> None:
    model = tiny("qwen2")
    plain = copy.deepcopy(model)
    with shared(model):
        for one, name in ((plain, "plain"), (model, "shared")):
            one.save_pretrained(tmp_path / name)
        files = [tmp_path / name / "model.safetensors" for name in ("plain", "shared")]
        assert files[0].read_bytes() == files[1].read_bytes()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shared")
        assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))
        for write in (torch.save, pickle.dump):
            for what in (
                lambda m: m,
                lambda m: m.state_dict(),
                lambda m: m.model.layers[0].self_attn.k_proj.weight,
            ):
                sizes = [size(write, what(m)) for m in (plain, model)]
                assert abs(sizes[1] - sizes[0]) < 1024, sizes
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert in_stacks(other) == []
            assert all(p.untyped_storage().nbytes() == p.nbytes for p in other.parameters())
            assert all(map(torch.equal, other.parameters(), plain.parameters()))


def test_a_model_from_a_file_shares_its_stacks(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with shared(AutoModelForCausalLM.from_pretrained(tmp_path)) as engine:
        assert engine.explain().prepared_bytes == 0
        assert engine.explain().shared_bytes > 0


def test_replaced_data_is_copied_and_the_report_says_so_by_layer() -> None:
    model = tiny("llama")
    with shared(model) as engine:
        whole = engine.explain().shared_bytes
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight.data = attention.v_proj.weight.detach() * 2
        same_tokens(engine)
        report = engine.explain()
        (copied,) = report.copies
        assert copied.name == "model.layers.1.self_attn.concat_rows"
        assert "put elsewhere since" in copied.reason
        assert report.prepared_bytes == copied.nbytes == 64 * 32 * 4
        assert report.shared_bytes == whole - copied.nbytes
        text = " ".join(str(report).split())
        assert "since): model.layers.1.self_attn.concat_rows" in text
        reweigh(model, 5)
        same_tokens(engine)


def test_a_model_of_another_dtype_is_laid_out_again() -> None:
    model = tiny("llama")
    with shared(model) as engine:
        model.to(torch.float64)
        same_tokens(engine)
        report = engine.explain()
        assert report.shared_bytes > 0
        # transformers 5.17 keeps its frequencies in float32, and copies nothing.
        assert {copy.name for copy in report.copies} <= {"model.rotary_emb.to"}


def test_a_loss_that_is_alive_keeps_its_gradients_and_the_next_version_is_laid_out() -> None:
    model = tiny("llama").train()
    ids = CALL["input_ids"]
    want = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    loss = model(input_ids=ids, labels=ids).loss
    with hybrid_fx.hybridize(model, share_storage=True, **PLAIN) as engine:
        engine.generate(**CALL)
        got = torch.autograd.grad(loss, list(model.parameters()))
        assert all(map(torch.equal, got, want))
        del loss, got
        reweigh(model, 1)
        engine.generate(**CALL)
        assert engine.explain().copies == ()


@pytest.mark.parametrize("lora", ["fold", "side"])
def test_base_weights_share_beside_branches_and_not_where_adapters_are_folded(lora: str) -> None:
    model = adapted(tiny("llama"))
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    with shared(model, lora=lora) as engine:
        report = engine.explain()
        if lora == "fold":
            assert report.shared_bytes == 0
            assert {c.reason for c in report.copies} == {"adapters are folded into it"}
        else:
            assert "fold" not in " ".join(c.reason for c in report.copies)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, base[name]), name
        randomize_adapters(model, 3)
        same_tokens(engine)
        if lora == "fold":
            with model.disable_adapter():
                same_tokens(engine)
                assert engine.explain().prepared_bytes == 0
                assert engine.explain().shared_bytes > 0
            same_tokens(engine)
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                assert torch.equal(parameter, base[name]), name


def test_two_engines_on_one_model_stay_right_and_say_who_copies() -> None:
    model, other = tiny("llama"), tiny("llama")
    for module, same in zip(model.modules(), other.modules(), strict=True):
        same._parameters = module._parameters
    with shared(model) as one, shared(other) as two:
        for seed in range(2):
            reweigh(model, seed)
            same_tokens(one)
            same_tokens(two)
        assert one.explain().shared_bytes == 0 < two.explain().shared_bytes
        assert all("put elsewhere since" in copy.reason for copy in one.explain().copies)


def test_released_memory_is_gone_and_the_layout_stays() -> None:
    model = tiny("llama")
    with shared(model, release_inference_cache=True) as engine:
        places = [p.data_ptr() for p in model.parameters()]
        reweigh(model, 1)
        same_tokens(engine)
        assert engine.stats.prepared_bytes == engine.stats.kv_bytes == 0
        assert [p.data_ptr() for p in model.parameters()] == places
        assert in_stacks(model) != []


def test_a_pass_that_writes_into_a_stack_gets_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_fx.runtime import runner

    monkeypatch.setattr(runner, "writes_in_place", lambda source: "concat_rows" in source)
    with shared(tiny("llama")) as engine:
        report = engine.explain()
        assert report.shared_bytes == 0
        assert report.prepared_bytes > 0


def test_a_closed_engine_leaves_parameters_with_memory_of_their_own() -> None:
    model = tiny("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    shared(model).close()
    assert in_stacks(model) == []
    for (name, parameter), same in zip(model.named_parameters(), parameters, strict=True):
        assert parameter is same
        assert torch.equal(parameter, before[name])
        assert parameter.untyped_storage().resizable()
    with shared(model) as again:
        assert again.explain().copies == ()


def test_weights_of_a_dtype_that_is_not_packed_are_laid_out_with_every_pass_in_place() -> None:
    model = tiny("llama").double()
    with hybrid_fx.hybridize(model, share_storage=True) as engine:
        same_tokens(engine)
        first = engine.explain()
        assert first.shared_bytes > 0
        assert not [copy for copy in first.copies if "pack" in copy.name]
        reweigh(model, 5)
        same_tokens(engine)
        assert engine.explain().shared_bytes == first.shared_bytes


def test_stacks_of_a_dtype_that_is_not_packed_keep_their_memory_from_switch_to_switch() -> None:
    model = tiny("llama").double()
    with hybrid_fx.hybridize(model) as engine:
        places = []
        for seed in range(2):
            reweigh(model, seed)
            same_tokens(engine)
            places.append([t.data_ptr() for t in engine._graphs.runner.prepared.tensors])
        assert engine.explain().prepared_bytes > 0
        assert places[0] == places[1]
