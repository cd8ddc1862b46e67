"""pack_weights: every product with a weight reads a packed one, and gives what it gave."""

from __future__ import annotations

import pytest
import torch
from memory_ledger import lies_in_pieces, packed_in, packed_memory
from tiny_models import VOCAB, tiny
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hybrid_fx.capture import capture
from hybrid_fx.passes import packing
from hybrid_fx.passes.contract import Context
from hybrid_fx.passes.driver import run_passes
from hybrid_fx.passes.graph import call, calls, name_of
from hybrid_fx.passes.packing import most_bytes, pack, packed_bytes, packed_linear, packs, refill
from hybrid_fx.passes.pipeline import OPTIONAL, PACK, STAGE
from hybrid_fx.plan.build import build_plan, normalize

needs_onednn = pytest.mark.skipif(
    not packs(torch.device("cpu"), torch.float32), reason="needs a torch built with oneDNN"
)


needs_pieces = pytest.mark.skipif(
    not lies_in_pieces(torch.float32),
    reason="needs a oneDNN that lays float32 weights out in blocks of rows, as torch 2.13's does",
)


def inside(weight: torch.Tensor) -> torch.Tensor:
    """A weight packed as its dtype is on this machine: some have no bfloat16 layout."""
    return pack(weight.to(packed_in(weight.dtype)))


def packed(kind: str, **options: object) -> fx.Graph:
    graph = normalize(capture(tiny(kind, **options)).graph)
    run_passes(graph, PACK, Context())
    return graph


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt", "phi3"])
def test_every_product_of_tokens_reads_a_packed_weight(kind: str) -> None:
    graph = packed(kind)
    assert not calls(graph, "linear")
    products = calls(graph, "packed_linear")
    assert len(products) > 4
    assert all(name_of(node.args[1]) == "pack" for node in products)
    again = run_passes(graph, PACK, Context())
    assert [record.result.count for record in again] == [0]


def test_a_tied_weight_is_packed_for_the_head_and_not_for_the_embedding() -> None:
    graph = packed("llama", tie_word_embeddings=True)
    (table,) = {node.args[1] for node in calls(graph, "embedding")}
    head = next(n for n in reversed(graph.nodes) if name_of(n) == "packed_linear")
    assert head.args[1].args[0] is table


def test_a_weight_that_two_products_read_is_packed_once() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    x.meta |= {"path": "", "input": "x", "val": torch.empty(2, 3, 4)}
    weight.meta |= {"path": "", "weight": "weight", "val": torch.empty(4, 4)}
    linear = torch._C._nn.linear
    first = graph.call_function(linear, (x, weight, None))
    second = graph.call_function(linear, (first, weight, None))
    for node in (first, second):
        node.meta |= {"path": "", "val": torch.empty(2, 3, 4)}
    graph.output(second)
    run_passes(graph, PACK, Context())
    assert len(calls(graph, "pack")) == 1
    assert len(calls(graph, "packed_linear")) == 2


def test_an_operator_of_two_products_takes_two_packed_weights_once() -> None:
    graph = fx.Graph()
    x, up, down = (graph.placeholder(name) for name in ("x", "up", "down"))
    with FakeTensorMode():
        x.meta |= {"path": "", "input": "x", "val": torch.empty(2, 3, 4)}
        for node, shape in ((up, (8, 4)), (down, (4, 8))):
            node.meta |= {"path": "", "weight": node.name, "val": torch.empty(shape)}
    mlp = call(graph, "plain_mlp", x, up, None, down, None, "relu", path="")
    graph.output(mlp)
    counts = [run_passes(graph, PACK, Context())[0].result.count for _ in range(2)]
    assert counts == [1, 0]
    assert [name_of(mlp.args[place]) for place in (1, 3)] == ["pack", "pack"]


def test_a_weight_that_the_graph_writes_is_not_packed() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    x.meta |= {"path": "", "input": "x", "val": torch.empty(2, 3, 4)}
    weight.meta |= {"path": "", "weight": "weight", "val": torch.empty(4, 4)}
    product = graph.call_function(torch._C._nn.linear, (x, weight, None))
    written = graph.call_function(torch.Tensor.add_, (weight, 1))
    for node, shape in ((product, (2, 3, 4)), (written, (4, 4))):
        node.meta |= {"path": "", "val": torch.empty(shape)}
    graph.output(product)
    run_passes(graph, PACK, Context())
    assert not calls(graph, "pack")


def test_operators_of_several_products_take_packed_weights() -> None:
    graph = normalize(capture(tiny("llama")).graph)
    plan = build_plan(graph, model="m", vocab_size=VOCAB, fusions="all", passes=OPTIONAL + PACK)
    for prepared in plan.manifest.prepared:
        multiplies = len(prepared.shape) == 2 and "embed" not in prepared.name
        assert prepared.packed == multiplies
        assert not prepared.recipe.startswith("pack(")
    assert (OPTIONAL + PACK + STAGE).facts >= {"packed", "gathered"}


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 5), (33, 1), (0, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_with_a_packed_weight_is_the_product(
    dtype: torch.dtype, shape: tuple[int, int], bias: bool
) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 24, generator=rng).to(dtype)
    x = torch.randn(*shape, 48, generator=rng).to(dtype)[..., ::2]
    b = torch.randn(37, generator=rng).to(dtype) if bias else None
    wanted = torch.nn.functional.linear(
        *(None if t is None else t.double() for t in (x, weight, b))
    )
    kept = inside(weight)
    assert kept.is_mkldnn
    found = packed_linear(x, kept, b)
    assert found.dtype == dtype
    scale = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), wanted, rtol=scale, atol=scale)
    plain = packed_linear(x, weight, b)
    torch.testing.assert_close(plain.double(), wanted, rtol=scale, atol=scale)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(3, 4, dtype=torch.float64),
        torch.ones(3, 4, dtype=torch.float16),
        torch.ones(0, 4),
        torch.ones(3, 4, device="meta"),
    ],
    ids=["float64", "float16", "empty", "another device"],
)
def test_what_has_no_other_layout_stays_as_it_is(weight: torch.Tensor) -> None:
    assert pack(weight) is weight


@needs_onednn
def test_bfloat16_stays_as_it_is_where_the_processor_lacks_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.ones(64, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert pack(weight) is weight
    assert pack(weight.float()).is_mkldnn


@needs_onednn
def test_packed_memory_is_refilled_where_it_fits() -> None:
    kept, new = pack(torch.zeros(32, 16)), torch.ones(32, 16)
    address = torch.ops.mkldnn.data_ptr(kept)
    assert refill(kept, new)
    assert torch.ops.mkldnn.data_ptr(kept) == address
    x = torch.randn(2, 1, 16)
    assert torch.equal(packed_linear(x, kept, None), packed_linear(x, pack(new), None))
    assert 32 * 16 * 4 <= packed_bytes(kept) <= most_bytes((32, 16), torch.float32)
    for other in (torch.ones(16, 32), torch.ones(32, 16, dtype=torch.bfloat16), torch.ones(32)):
        assert not refill(kept, other)
    assert not refill(kept, new, new)
    assert not refill(torch.zeros(32, 16), new)
    assert not refill(kept, pack(new)), "what is packed already has no rows"


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(
    "rows",
    [(300,), (128, 64, 64), (70, 58, 9), (17,), (192, 130), (65,), (64, 1, 200)],
    ids=str,
)
def test_memory_refilled_in_pieces_is_what_packing_the_whole_stack_gives(
    rows: tuple[int, ...], turned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack of several whose layout has no pieces is refused, and packed anew by the caller."""
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 48, generator=rng).to(dtype) for n in rows]
    wanted, into = inside(torch.cat(weights)), packed_in(dtype)
    if turned:
        weights = [weight.t().contiguous().t() for weight in weights]
    for elements in (1, 64 * 48, 128 * 48, 2**21):
        monkeypatch.setattr(packing, "_AT_ONCE", elements)
        kept = inside(torch.zeros(sum(rows), 48, dtype=dtype))
        address = torch.ops.mkldnn.data_ptr(kept)
        done = refill(kept, *weights, dtype=into)
        fits = lies_in_pieces(dtype) or (len(rows) == 1 and into == dtype)
        if into != dtype and rows == (65,):  # whose last row lies otherwise, if it is a piece
            fits = elements >= 128 * 48
        assert done == fits
        if not done:
            continue
        assert torch.ops.mkldnn.data_ptr(kept) == address
        assert packed_memory(kept) == packed_memory(wanted)


@needs_pieces
def test_a_refill_packs_no_more_at_once_than_it_states(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(weight: torch.Tensor) -> torch.Tensor:
        made.append(packed_bytes(new := pack(weight)))
        return new

    monkeypatch.setattr(packing, "pack", counted)
    monkeypatch.setattr(packing, "_AT_ONCE", 128 * 48)
    weights = torch.randn(499, 48), torch.randn(501, 48), torch.randn(24, 48)
    kept = pack(torch.zeros(1024, 48))
    assert refill(kept, *weights)
    assert len(made) == 8
    stated = packing.piece_bytes((1024, 48), torch.float32)
    assert 2 * max(made) == stated < packed_bytes(kept)
    assert packing.piece_bytes((17, 48), torch.float32) == 2 * most_bytes((17, 48), torch.float32)


@needs_pieces
def test_a_layout_in_which_rows_lie_otherwise_is_filled_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plain weight of one row has no blocks, so that the end of this one lies otherwise alone."""
    weight, pieces = torch.randn(129, 48), []

    def counted(piece: torch.Tensor) -> torch.Tensor:
        pieces.append(piece.shape[0])
        return pack(piece)

    monkeypatch.setattr(packing, "pack", counted)
    monkeypatch.setattr(packing, "_AT_ONCE", 128 * 48)
    kept = pack(torch.zeros(129, 48))
    assert refill(kept, weight)
    assert pieces == [128, 1, 129]
    assert packed_memory(kept) == packed_memory(pack(weight))


@needs_pieces
def test_a_stack_that_does_not_lie_in_pieces_is_given_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces: list[int] = []

    def counted(piece: torch.Tensor) -> torch.Tensor:
        pieces.append(piece.shape[0])
        return pack(piece)

    monkeypatch.setattr(packing, "pack", counted)
    assert not refill(pack(torch.zeros(193, 48)), torch.randn(192, 48), torch.randn(1, 48))
    assert pieces == [192, 1]


@needs_onednn
def test_a_layout_whose_distances_depend_on_its_rows_is_filled_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of a transpose, whose description names the rows a third time, as a distance."""
    weight, kept, pieces = torch.randn(256, 48), pack(torch.zeros(256, 48)), []
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_get_mkldnn_serialized_md",
        lambda tensor: torch.tensor([2, *[tensor.shape[0]] * 3, 48], dtype=torch.int32),
    )

    def counted(piece: torch.Tensor) -> torch.Tensor:
        pieces.append(piece.shape[0])
        return pack(piece)

    monkeypatch.setattr(packing, "pack", counted)
    monkeypatch.setattr(packing, "_AT_ONCE", 128 * 48)
    assert not packing._refilled(kept, [weight], 128)
    assert pieces == [128]


@needs_onednn
def test_a_refill_with_a_weight_that_is_not_packed_says_no() -> None:
    kept = pack(torch.ones(64, 48))
    assert refill(kept, torch.ones(0, 48), torch.ones(64, 48)), "of no rows nothing is laid out"
    assert not refill(
        kept, torch.ones(32, 48), torch.nn.Buffer(torch.ones(32, 48)).as_subclass(Odd)
    )


class Odd(torch.Tensor):
    """A tensor that packing leaves alone."""
