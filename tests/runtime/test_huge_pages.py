"""Packed weights lie in huge pages where the system has them, and else where torch put them."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_ledger import address, lies_in_pieces

from hybrid_fx.passes.packing import pack, packed_bytes, packed_linear, packs, refill
from hybrid_fx.plan.records import Prepared
from hybrid_fx.runtime import huge_pages, placing, prepared
from hybrid_fx.runtime.huge_pages import PAGE, block
from hybrid_fx.runtime.placing import place
from hybrid_fx.runtime.prepared import PreparedTensors

ON_DEMAND = Path("/sys/kernel/mm/transparent_hugepage/enabled")
huge = pytest.mark.skipif(
    not ON_DEMAND.exists() or "[never]" in ON_DEMAND.read_text(),
    reason="needs a Linux that gives huge pages on demand",
)
SHAPE = (1024, 768)  # 3 MiB in float32: one page and a half
WANTED = Prepared(name="w", recipe="", shape=SHAPE, dtype="float32", owns_memory=True, packed=True)
pytestmark = pytest.mark.skipif(
    not packs(torch.device("cpu"), torch.float32), reason="needs a torch built with oneDNN"
)


def memory(nbytes: int) -> torch.Tensor:
    found = block(nbytes)
    assert found is not None
    return found


def in_huge_pages(where: int) -> int:
    """Bytes in huge pages of the mapping in which an address lies."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= where < end
        elif inside and head == "AnonHugePages:":
            return int(rest.split()[0]) * 1024
    return 0


@huge
def test_whole_pages_of_a_block_are_huge_and_no_more_than_it_needs() -> None:
    held = memory(PAGE * 3 // 2)
    assert held.data_ptr() % PAGE == 0
    assert held.untyped_storage().nbytes() == PAGE * 3 // 2
    assert in_huge_pages(held.data_ptr()) == 0, "memory that nobody wrote to is not there"
    held.zero_()
    assert in_huge_pages(held.data_ptr()) == PAGE


def test_a_block_without_a_whole_page_has_none() -> None:
    assert block(PAGE - 1) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPE, (1031, 1033), (48, 70)])
def test_a_placed_weight_is_the_same_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if not packs(torch.device("cpu"), dtype):
        pytest.skip(f"this processor has no oneDNN products in {dtype}")
    weights = [torch.randn(shape).to(dtype) for _ in range(2)]
    packed = pack(weights[0])
    bytes_of = torch.empty(packed_bytes(packed) + 64, dtype=torch.uint8)
    inside = bytes_of[-bytes_of.data_ptr() % 64 :][: packed_bytes(packed)]
    placed = place(packed, inside)
    assert address(placed) == inside.data_ptr()
    assert (placed.shape, placed.dtype, placed.is_mkldnn) == (shape, dtype, True)
    for weight in weights:
        assert refill(placed, weight)
        for rows in (1, 5):
            x = torch.randn(rows, 1, shape[1]).to(dtype)
            assert torch.equal(packed_linear(x, placed, None), packed_linear(x, pack(weight), None))
        assert torch.equal(placed.to_dense(), weight)


def test_a_placed_weight_keeps_its_memory_and_nothing_keeps_it_longer() -> None:
    bytes_of = memory(4 * PAGE)
    weight = torch.randn(SHAPE)
    placed, watched = place(pack(weight), bytes_of), weakref.ref(bytes_of)
    del bytes_of
    gc.collect()
    assert torch.equal(placed.to_dense(), weight)
    del placed
    assert watched() is None


@huge
def test_prepared_weights_lie_in_huge_pages_from_version_to_version() -> None:
    held, places = PreparedTensors((WANTED,)), []
    for value in (1.0, 2.0):
        held.begin()
        held.store_packed(0, torch.full(SHAPE, value))
        held.finish()
        (tensor,) = held.tensors
        assert tensor.to_dense().eq(value).all()
        assert in_huge_pages(address(tensor)) == PAGE
        places.append(address(tensor))
    assert places[0] == places[1]
    assert held.nbytes == packed_bytes(tensor)
    del tensor
    held.release()
    assert in_huge_pages(places[0]) == 0


def refuse(*_: Any, **__: Any) -> None:
    raise OSError("no")


@pytest.mark.parametrize(
    "lacks",
    [
        lambda patch: patch.setattr(mmap, "mmap", refuse),
        lambda patch: patch.delattr(mmap, "MADV_HUGEPAGE", raising=False),
        lambda patch: patch.setattr(placing, "_shim", lambda: None),
    ],
    ids=["memory", "huge pages", "torch's interface"],
)
def test_without_any_of_it_a_weight_stays_where_torch_put_it(
    lacks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks(monkeypatch)
    assert huge_pages.mmap is mmap
    held, packed = PreparedTensors((WANTED,)), pack(torch.ones(SHAPE))
    held.begin()
    held.store(0, packed)
    held.finish()
    assert address(held.tensors[0]) == address(packed)


HALF = SHAPE[0] // 2


@huge
@pytest.mark.parametrize(
    "rows",
    [
        (SHAPE[0],),
        pytest.param(
            (HALF, HALF),
            marks=pytest.mark.skipif(
                not lies_in_pieces(torch.float32),
                reason="needs a oneDNN that lays float32 weights out in blocks of rows",
            ),
        ),
    ],
    ids=["one weight", "a stack"],
)
def test_layers_behind_the_first_are_packed_where_they_will_lie(
    rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = PreparedTensors((WANTED, WANTED))
    held.begin()
    held.store_packed(0, torch.ones(SHAPE))
    monkeypatch.setattr(prepared, "place", refuse)  # nothing is moved any more
    numbers = torch.arange(float(SHAPE[0]))[:, None]
    held.store_packed(1, *numbers.expand(SHAPE).contiguous().split(rows))
    held.finish()
    first, second = held.tensors
    assert first.to_dense().eq(1).all()
    assert second.to_dense().eq(numbers).all()
    assert in_huge_pages(address(second)) == PAGE
    assert held.nbytes == 2 * packed_bytes(first)
