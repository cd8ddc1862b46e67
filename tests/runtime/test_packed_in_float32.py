"""Prepared tensors of bfloat16 weights packed in float32: memory, versions, what few rows read."""

from __future__ import annotations

import pytest
import torch
from memory_ledger import address, lies_in_pieces, live_bytes, without_collector

from hybrid_fx.passes.packing import PackForm, lent, packed_bytes, packs
from hybrid_fx.plan.plan import Manifest
from hybrid_fx.plan.records import Prepared
from hybrid_fx.runtime.peak import prepare_peak_bytes
from hybrid_fx.runtime.prepared import PreparedTensors

CPU = torch.device("cpu")
FORMS = {torch.bfloat16: PackForm(torch.float32, plain_rows=1)}

pytestmark = pytest.mark.skipif(
    not packs(CPU, torch.float32), reason="needs a torch built with oneDNN"
)


def wanted(rows: int, inputs: int, count: int = 1) -> tuple[Prepared, ...]:
    record = {"recipe": "", "shape": (rows, inputs), "dtype": "bfloat16", "owns_memory": True}
    return tuple(Prepared(name=f"t{i}", packed=True, **record) for i in range(count))


def prepared(held: PreparedTensors, *weights: torch.Tensor, own: bool = True) -> torch.Tensor:
    held.begin(weights if own else ())
    held.store_packed(0, *weights)
    held.finish()
    return held.tensors[0]


def parameters(*rows: int, seed: int = 0, inputs: int = 32) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, inputs, generator=rng).bfloat16()) for n in rows]


def test_its_memory_is_kept_and_what_is_lent_belongs_to_the_version() -> None:
    held, addresses = PreparedTensors(wanted(128, 32), forms=FORMS), set()
    for seed in range(3):
        weights = parameters(64, 64, seed=seed)
        tensor = prepared(held, *weights)
        addresses.add(address(tensor))
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.to_dense(), torch.cat(weights).float())
        few = lent(tensor)
        assert few is not None
        assert few.rows == 1
        assert [p.data_ptr() for p in few.parts] == [w.data_ptr() for w in weights]
        assert not any(part.requires_grad for part in few.parts)
    assert len(addresses) == 1 or not lies_in_pieces(torch.float32)
    assert held.nbytes == packed_bytes(tensor)
    assert [dtype for _, _, dtype in held.copies] == [torch.float32]
    held.release()
    assert held.nbytes == 0


def test_nothing_is_lent_but_memory_of_the_model_that_lies_as_its_rows() -> None:
    held = PreparedTensors(wanted(64, 32), forms=FORMS)
    assert lent(prepared(held, *parameters(64))) is not None
    assert lent(prepared(held, *parameters(64), own=False)) is None
    (turned,) = parameters(32)
    turned = torch.nn.Parameter(torch.zeros(32, 64).bfloat16()).t()
    assert lent(prepared(held, turned)) is None
    assert lent(prepared(held, *parameters(64))) is not None


def test_where_no_rows_read_the_weight_none_is_lent() -> None:
    held = PreparedTensors(wanted(64, 32), forms={torch.bfloat16: PackForm(torch.float32)})
    assert lent(prepared(held, *parameters(64))) is None


def test_a_form_that_packs_nothing_takes_the_weight_as_it_is() -> None:
    held = PreparedTensors((*wanted(64, 32),), forms={})
    (weight,) = parameters(64)
    assert torch.equal(prepared(held, weight), weight)
    assert not held.tensors[0].is_mkldnn


@pytest.mark.parametrize("rows", [(1000,), (300, 700)], ids=str)
@pytest.mark.usefixtures("ledger")
def test_a_prepare_holds_no_more_than_is_stated(
    rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held at the moments when a copy has just been made: the ledger counts live tensors."""
    from hybrid_fx.passes import packing
    from hybrid_fx.runtime import prepared as place

    weights, most = parameters(*rows, inputs=640), [0]
    real = torch.ops.mkldnn._reorder_linear_weight

    def looked(weight: torch.Tensor, hint: int) -> torch.Tensor:
        new = real(weight, hint)
        most[0] = max(most[0], live_bytes())
        return new

    monkeypatch.setattr(packing, "_AT_ONCE", 128 * 640)
    monkeypatch.setattr(packing.torch.ops.mkldnn, "_reorder_linear_weight", looked)
    real_place = place.place

    def placed(packed: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        done = real_place(packed, memory)
        most[0] = max(most[0], live_bytes())
        return done

    monkeypatch.setattr(place, "place", placed)
    manifest = Manifest(
        model="m", vocab_size=8, weights=(), prepared=wanted(1000, 640), kv=(), guards={}
    )
    stated = prepare_peak_bytes(manifest, CPU, gathers=False, forms=FORMS)
    held = PreparedTensors(manifest.prepared, forms=FORMS)
    with without_collector():
        for _ in range(2):
            most[0], before = 0, live_bytes()
            prepared(held, *weights)
            assert 0 < most[0] - before <= stated
            assert stated <= 2.1 * 1024 * 640 * 4
