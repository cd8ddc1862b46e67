"""A bfloat16 weight packed in float32: the product it was, no copy larger than it says."""

from __future__ import annotations

import pytest
import torch
from memory_ledger import lies_in_pieces, packed_memory

from hybrid_fx.passes import packing
from hybrid_fx.passes.packing import (
    FewRows,
    PackForm,
    lend,
    lent,
    most_bytes,
    pack,
    packed_bytes,
    packed_linear,
    packs,
    piece_bytes,
    refill,
    usual_forms,
)

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not packs(CPU, torch.float32), reason="needs a torch built with oneDNN"
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 5), (33, 1), (0, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_its_product_has_the_dtype_of_the_input_and_is_no_further_from_the_exact_one(
    shape: tuple[int, int], bias: bool
) -> None:
    weight, x = drawn(37, 24), drawn(*shape, 24, seed=1)
    b = drawn(37, seed=2) if bias else None
    exact = torch.nn.functional.linear(*(t if t is None else t.double() for t in (x, weight, b)))
    found = packed_linear(x, pack(weight.float()), b)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16)) or bool(
        ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
    ), "it is rounded once, at the end"


@pytest.mark.parametrize("rows", [(37,), (8, 5, 24)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_read_the_weights_that_are_lent_and_more_the_packed_one(
    rows: tuple[int, ...], bias: bool
) -> None:
    parts = [drawn(n, 24, seed=n) for n in rows]
    b = drawn(37, seed=2) if bias else None
    kept = pack(torch.zeros(37, 24))  # nothing of the weights, so that one sees what is read
    nothing = torch.zeros(37).bfloat16() if b is None else b
    lend(kept, FewRows(2, tuple(parts)))
    for shape in ((1, 1), (1, 2), (2, 1)):
        x = drawn(*shape, 24, seed=3)
        wanted = torch.nn.functional.linear(x, torch.cat(parts), b)
        torch.testing.assert_close(packed_linear(x, kept, b), wanted, rtol=1e-2, atol=1e-2)
    for shape in ((1, 3), (3, 1), (2, 2)):
        found = packed_linear(drawn(*shape, 24), kept, b)
        assert torch.equal(found, nothing.expand(*shape, 37))
    lend(kept, None)
    assert lent(kept) is None
    assert torch.equal(packed_linear(drawn(1, 1, 24), kept, b), nothing.expand(1, 1, 37))


@pytest.mark.parametrize("rows", [(300,), (128, 64, 64), (70, 58, 9), (17,)], ids=str)
def test_its_memory_is_refilled_in_pieces_that_are_cast(
    rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [drawn(n, 48, seed=n) for n in rows]
    wanted = pack(torch.cat(weights).float())
    made: list[int] = []

    def counted(weight: torch.Tensor) -> torch.Tensor:
        made.append(packed_bytes(new := pack(weight)))
        return new

    monkeypatch.setattr(packing, "pack", counted)
    monkeypatch.setattr(packing, "_AT_ONCE", 64 * 48)
    kept = pack(torch.zeros(sum(rows), 48))
    assert not refill(kept, *weights), "in their own dtype they are no such weights"
    if not lies_in_pieces(torch.float32):
        assert not refill(kept, *weights, dtype=torch.float32) or sum(rows) <= 64
        return
    assert refill(kept, *weights, dtype=torch.float32)
    assert packed_memory(kept) == packed_memory(wanted)
    assert 2 * max(made) <= piece_bytes((sum(rows), 48), torch.float32)


def test_a_cast_that_does_not_lie_in_pieces_is_given_up_before_it_is_made_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def counted(weight: torch.Tensor) -> torch.Tensor:
        sizes.append(weight.shape[0])
        return pack(weight)

    monkeypatch.setattr(packing, "pack", counted)
    monkeypatch.setattr(packing, "_AT_ONCE", 64 * 48)
    monkeypatch.setattr(packing, "_lies_in", lambda piece, whole: False)
    assert not refill(pack(torch.zeros(300, 48)), drawn(300, 48), dtype=torch.float32)
    assert sizes == [64]


def test_a_refill_holds_one_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def counted(weight: torch.Tensor) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in made))
        new = pack(weight)
        made.extend((weakref.ref(weight), weakref.ref(new)))
        return new

    monkeypatch.setattr(packing, "pack", counted)
    monkeypatch.setattr(packing, "_AT_ONCE", 64 * 48)
    refill(pack(torch.zeros(256, 48)), drawn(256, 48), dtype=torch.float32)
    assert set(alive) == {0}


def test_the_usual_form_is_the_own_dtype_where_that_can_be_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    single = PackForm(torch.float32)
    for has, wanted in (
        (True, PackForm(torch.bfloat16)),
        (False, PackForm(torch.float32, plain_rows=1)),
    ):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        assert usual_forms(CPU) == {torch.float32: single, torch.bfloat16: wanted}
    assert usual_forms(torch.device("meta")) == {}
    assert most_bytes((64, 64), torch.float32) == 2 * most_bytes((64, 64), torch.bfloat16)
