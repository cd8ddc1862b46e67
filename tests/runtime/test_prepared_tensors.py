"""Prepared tensors belong to one weight version: whole, or not in use."""

from __future__ import annotations

import pytest
import torch
from memory_ledger import address
from tiny_models import adapted, prompt, randomize_adapters, reweigh, tiny

import hybrid_fx
from hybrid_fx.passes.packing import pack, packs
from hybrid_fx.plan.records import Prepared
from hybrid_fx.runtime.prepared import PreparedTensors

opaque = pytest.mark.skipif(
    not packs(torch.device("cpu"), torch.float32), reason="needs a torch built with oneDNN"
)


def wanted(count, owns=True, packed=False):
    record = {"recipe": "", "shape": (2, 3), "dtype": "float32", "owns_memory": owns}
    return tuple(Prepared(name=f"t{i}", **record, packed=packed) for i in range(count))


def filled(held, values):
    held.begin()
    for index, value in enumerate(values):
        held.store(index, value)
    held.finish()
    return held.tensors


def packed_of(held, *weights):
    held.begin()
    held.store_packed(0, *weights)
    held.finish()
    return held.tensors


def test_memory_is_refilled_from_version_to_version():
    held = PreparedTensors(wanted(2))
    first = [t.data_ptr() for t in filled(held, [torch.ones(2, 3), torch.zeros(2, 3)])]
    new = [torch.full((2, 3), 5.0), torch.full((2, 3), 6.0)]
    again = filled(held, new)
    assert [t.data_ptr() for t in again] == first
    assert all(map(torch.equal, again, new))
    assert held.nbytes == 2 * 6 * 4


@pytest.mark.parametrize(
    "other",
    [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64), torch.ones(3, 2).t()],
    ids=["shape", "dtype", "stride"],
)
def test_memory_that_does_not_fit_is_replaced(other):
    held = PreparedTensors(wanted(1))
    first = filled(held, [torch.zeros(2, 3)])[0]
    assert filled(held, [other])[0] is not first
    assert torch.equal(held.tensors[0], other)
    assert first.eq(0).all()


def test_a_slice_does_not_keep_the_rest():
    held, whole = PreparedTensors(wanted(1)), torch.rand(4, 3)
    (kept,) = filled(held, [whole[:2]])
    assert kept.untyped_storage().nbytes() == held.nbytes == 2 * 3 * 4
    assert torch.equal(kept, whole[:2])
    (view,) = filled(PreparedTensors(wanted(1, owns=False)), [whole[:2]])
    assert view.data_ptr() == whole.data_ptr()
    padded = torch.rand(7)[:6].view(2, 3)  # as what was gathered from equal shards
    assert filled(PreparedTensors(wanted(1)), [padded])[0].data_ptr() == padded.data_ptr()


def test_weights_are_taken_as_they_are_and_never_written():
    held = PreparedTensors(wanted(1, owns=False))
    weights = [torch.nn.Parameter(torch.full((2, 3), float(i))) for i in range(2)]
    for index, weight in enumerate(weights):
        (tensor,) = filled(held, [weight])
        assert tensor.data_ptr() == weight.data_ptr()
        assert not tensor.requires_grad
        assert weight.eq(index).all()
        assert weight._version == 0
    assert held.nbytes == 0


@opaque
def test_packed_memory_is_refilled_and_that_of_an_opaque_weight_is_not() -> None:
    weights = [torch.full((2, 3), float(i)) for i in range(2)]
    lent = PreparedTensors(wanted(1, owns=False))
    opaque_ones = [pack(weight) for weight in weights]
    for weight in opaque_ones:
        (tensor,) = filled(lent, [weight])
        assert address(tensor) == address(weight)
    assert [weight.to_dense().mean().item() for weight in opaque_ones] == [0, 1]
    assert lent.nbytes == 0
    assert lent.copies == []
    own = PreparedTensors(wanted(1, owns=False, packed=True))
    (first,), (second,) = ([*packed_of(own, weight)] for weight in weights)
    assert address(first) == address(second)
    assert first.to_dense().eq(1).all()
    assert [packed for _, _, packed in own.copies] == [torch.float32]


@opaque
def test_a_stack_is_packed_of_its_weights_in_the_memory_of_the_last_version() -> None:
    held, addresses = PreparedTensors(wanted(1, packed=True)), set()
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        weights = [torch.rand(rows, 3, generator=rng, requires_grad=True) for rows in (2, 5, 1)]
        (tensor,) = packed_of(held, *weights)
        addresses.add(address(tensor))
        assert not tensor.requires_grad
        assert torch.equal(tensor.to_dense(), torch.cat(weights))
    assert len(addresses) == 1
    (other,) = packed_of(held, *weights[:2])
    assert torch.equal(other.to_dense(), torch.cat(weights[:2]))


def test_a_stack_of_a_device_without_a_layout_is_joined_as_its_graph_says() -> None:
    whole, weights = torch.rand(4, 3).double(), [torch.rand(2, 3).double() for _ in range(2)]
    joined = []

    def join(*given: torch.Tensor) -> torch.Tensor:
        joined.append(len(given))
        return whole

    held = PreparedTensors(wanted(1, packed=True), join=join)
    (tensor,) = packed_of(held, *weights)
    assert torch.equal(tensor, whole)
    assert joined == [2]


def test_a_packed_weight_of_a_device_without_a_layout_is_the_weight() -> None:
    weight = torch.ones(2, 3)
    (tensor,) = filled(held := PreparedTensors(wanted(1, owns=False, packed=True)), [weight])
    assert tensor.data_ptr() == weight.data_ptr()
    assert held.copies == []


def test_a_version_that_is_not_whole_cannot_be_used():
    held = PreparedTensors(wanted(2))
    filled(held, [torch.ones(2, 3), torch.ones(2, 3)])
    held.begin()
    held.store(1, torch.zeros(2, 3))
    assert held.tensors == []
    with pytest.raises(RuntimeError, match="left out t0"):
        held.finish()
    assert held.tensors == []


def test_release_gives_all_memory_back():
    held = PreparedTensors(wanted(1))
    filled(held, [torch.ones(2, 3)])
    held.release()
    assert held.tensors == []
    assert held.nbytes == 0


CALL = {**prompt((5, 3)), "max_new_tokens": 6, "do_sample": False}


def interrupted(engine, monkeypatch, error):
    """Generate once, with ``error`` after the third tensor of prepare was stored."""
    held = engine._graphs.runner.prepared
    real, stored = held.store, []

    def store(index, value):
        if len(stored) == 3:
            raise error
        stored.append(index)
        real(index, value)

    with monkeypatch.context() as patch:
        patch.setattr(held, "store", store)
        with pytest.raises(type(error)):
            engine.generate(**CALL)
    assert len(stored) == 3


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError()])
def test_after_a_prepare_that_was_cut_short_the_next_generate_prepares_again(monkeypatch, error):
    model = tiny("llama")
    engine = hybrid_fx.hybridize(model)
    engine.generate(**CALL)
    reweigh(model, seed=5)
    interrupted(engine, monkeypatch, error)
    assert engine._graphs.runner.prepared.tensors == []
    for _ in range(2):  # the weights as they are, then the weights of before
        expected = engine._plain_generate(**CALL)
        assert torch.equal(engine.generate(**CALL), expected)
        reweigh(model, seed=0)
    assert engine.stats.counters["prepares"] == 3
    assert engine.stats.counters["hf_forwards"] == 0
    assert engine.stats.fallbacks == {}


def test_a_first_use_that_was_cut_short_is_proven_again(monkeypatch):
    from hybrid_fx.engine import prover

    engine = hybrid_fx.hybridize(tiny("llama"))
    expected = engine._plain_generate(**CALL)
    real, probed = prover.probe, []

    def probe(*args):
        probed.append(args)
        if len(probed) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(prover, "probe", probe)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(**CALL)
    assert torch.equal(engine.generate(**CALL), expected)
    engine.generate(**CALL)
    assert len(probed) == 2


def test_a_capture_that_was_cut_short_is_begun_again(monkeypatch):
    from hybrid_fx.engine import plans

    engine = hybrid_fx.hybridize(tiny("llama"), disk_cache=False)
    expected = engine._plain_generate(**CALL)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plans, "capture", stop)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(**CALL)
    assert torch.equal(engine.generate(**CALL), expected)
    assert engine.stats.fallbacks == {}
    assert engine.stats.counters["hf_forwards"] == 0


def test_a_choice_of_side_that_was_cut_short_is_made_again(monkeypatch):
    from hybrid_fx.engine import plans

    model = adapted(tiny("llama"))
    model.to(torch.bfloat16)
    engine = hybrid_fx.hybridize(model, disk_cache=False)
    engine.generate(**CALL)
    assert {row.choice for row in engine.explain().lora} == {"fold"}
    randomize_adapters(model, 3, 1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "build_plan", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            engine.generate(**CALL)
    engine.generate(**CALL)
    assert {row.choice for row in engine.explain().lora} == {"side"}
    assert engine.stats.fallbacks == {}


def test_memory_is_kept_over_switches_and_given_back_where_asked():
    for release in (False, True):
        model = tiny("llama")
        engine = hybrid_fx.hybridize(model, release_inference_cache=release)
        addresses = []
        for seed in range(3):
            engine.eval()
            engine.generate(**CALL)
            graphs = engine._graphs
            addresses.append([t.data_ptr() for t in graphs.runner.workspace.keys])
            addresses[-1] += [address(t) for t in graphs.runner.prepared.tensors]
            said = engine.explain() if not release else None
            if said is not None:
                keys = graphs.runner.workspace
                held = {t.untyped_storage().data_ptr(): t for t in (*keys.keys, *keys.values)}
                real = sum(t.untyped_storage().nbytes() for t in held.values())
                assert said.kv_bytes == real == engine.stats.kv_bytes > 0
            engine.train()
            reweigh(model, seed)
        if release:
            assert graphs.runner.workspace.nbytes == graphs.runner.prepared.nbytes == 0
        else:
            assert addresses[0] == addresses[1] == addresses[2] != []
        assert engine.stats.counters["captures"] <= 1
