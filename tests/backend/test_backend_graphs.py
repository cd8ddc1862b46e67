"""What is handed on: the same graph where nothing fits, and only the matched regions changed."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backend_models import Decoder, compiled, handed_over, lines, rewritten
from torch import Tensor, fx, nn

from hybrid_fx.backend import BackendOptions
from hybrid_fx.backend.compile import rewrite
from hybrid_fx.passes.graph import name_of

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """The basic block of a ResNet, with what writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def _resnet() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(Block() for _ in range(3))), torch.randn(1, 4, 5, 5)


def _encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), X


@pytest.mark.parametrize("make", [_resnet, _encoder])
@pytest.mark.parametrize("training", [True, False])
def test_where_nothing_fits_the_very_graph_of_dynamo_is_handed_on(
    make: Callable[[], tuple[nn.Module, Tensor]], training: bool
) -> None:
    model, example = make()
    with torch.set_grad_enabled(training):
        before, after = handed_over(model.train(training), example)
    assert after is before


def test_no_copy_is_made_of_a_graph_without_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[fx.Graph] = []
    monkeypatch.setattr("hybrid_fx.backend.compile.working_copy", copied.append)
    model, example = _resnet()
    with torch.no_grad():
        handed_over(model.eval(), example)
    assert copied == []


def test_only_the_matched_regions_change_and_the_rest_keeps_name_order_and_meta() -> None:
    with torch.no_grad():
        before, after = handed_over(Decoder(), X)
    old = {node.name: node for node in before.graph.nodes}
    kept = [node for node in after.graph.nodes if node.name in old]
    new = [node for node in after.graph.nodes if node.name not in old]
    assert [name_of(node) for node in new] == [
        "rms_norm",
        "add_rms_norm",
        "getitem",
        "getitem",
        "split_gated_mlp",
    ]
    place = {name: index for index, name in enumerate(old)}
    assert [place[node.name] for node in kept] == sorted(place[node.name] for node in kept)
    for node in kept:
        assert (node.op, node.target) == (old[node.name].op, old[node.name].target)
        assert node.meta["then"] == old[node.name].meta["then"]
    gone = set(old) - {node.name for node in kept}
    assert {"placeholder", "output"}.isdisjoint(old[name].op for name in gone)
    assert all("origin" not in node.meta["then"] for node in after.graph.nodes)


def test_new_nodes_carry_the_values_and_places_that_inner_backends_read() -> None:
    with torch.no_grad():
        before, after = handed_over(Decoder(), X)
    old = {node.name for node in before.graph.nodes}
    for node in after.graph.nodes:
        if node.name in old or node.op != "call_function":
            continue
        meta = node.meta["then"]
        value = meta["example_value"]
        value = value[0] if isinstance(value, tuple) else value
        assert tuple(value.shape) == (2, 3, 8)
        assert value.dtype == torch.float32
        assert "layers.0" in str(meta["nn_module_stack"])
        assert meta["stack_trace"]


def test_what_dynamo_hung_on_its_module_goes_along() -> None:
    with torch.no_grad():
        before, after = handed_over(Decoder(), X)
    assert after is not before
    assert set(vars(before)) <= set(vars(after))
    assert [n.name for n in after.graph.nodes if n.op == "placeholder"] == [
        n.name for n in before.graph.nodes if n.op == "placeholder"
    ]


@torch.library.custom_op("hybrid_fx_tests::touch", mutates_args=("x",))
def touch(x: Tensor) -> None:
    """Writes its argument, as a cache update does."""
    x.mul_(2.0)


def _written(x: Tensor) -> Tensor:
    touch(x)
    return x


def _in_place(x: Tensor) -> Tensor:
    x += 1.0
    return x


def _through_a_view(x: Tensor) -> Tensor:
    x[:, 0].mul_(3.0)
    return x


def _set_item(x: Tensor) -> Tensor:
    x[:, 0] = 5.0
    return x


@pytest.mark.parametrize("between", [_written, _in_place, _through_a_view, _set_item])
def test_nothing_is_moved_across_a_write_to_what_it_reads(
    between: Callable[[Tensor], Tensor],
) -> None:
    model = Decoder(2, between=between)
    fast, reports = compiled(model, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(fast(X.clone()), model(X.clone()))
    (report,) = rewritten(reports)
    assert report.passes["fuse_add_norm"] == 0, "the sum is written before the norm reads it"
    assert report.passes["fuse_rms_norm"] >= 1


@torch._dynamo.allow_in_graph
def unknown(x: Tensor) -> Tensor:
    """A function of which the backend knows nothing: it writes its argument."""
    x.mul_(0.5)
    return x + 1.0


def test_a_function_of_which_nothing_is_known_keeps_its_place() -> None:
    model = Decoder(2, between=unknown)
    with torch.no_grad():
        before, after = handed_over(model, X.clone())
        fast, _ = compiled(model)
        assert torch.equal(fast(X.clone()), model(X.clone()))
    for gm in (before, after):
        assert [node.target for node in gm.graph.nodes].count(unknown) == 2
    assert after is not before, "the MLP behind it is fused all the same"


def test_a_region_that_spans_an_autocast_scope_is_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                up = self.fc1(x)
            return self.fc2(F.relu(up.float()) if up.dtype == torch.float16 else F.relu(up))

    model = nn.Sequential()
    model.layers = nn.ModuleList([Odd()])
    layer = model.layers[0].bfloat16()
    fast, reports = compiled(lambda x: layer(x), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(fast(X.bfloat16()), layer(X.bfloat16()))
    (report,) = reports
    assert report.failure is None
    assert report.passes["fuse_mlp"] == 1
    assert report.replaced == 0
    assert "the scope of" in report.declined[0].expected


class _Cached(nn.Module):
    """A decoder that writes a cache it was given, and hands out several values."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(1)

    def forward(self, x: Tensor, cache: Tensor, at: Tensor) -> dict[str, Any]:
        y = self.decoder(x)
        cache.index_copy_(1, at, y)
        return {"out": y, "sum": cache.sum(), "both": (y * 2, 7)}


def test_caches_written_in_place_several_outputs_and_constants_come_through() -> None:
    model = _Cached()
    fast, reports = compiled(model, fullgraph=True)
    at = torch.tensor([1, 2, 4])
    one, other = torch.zeros(2, 6, 8), torch.zeros(2, 6, 8)
    with torch.no_grad():
        got, wanted = fast(X, one, at), model(X, other, at)
    assert torch.equal(one, other)
    assert got["both"][1] == 7
    assert torch.equal(got["out"], wanted["out"])
    assert torch.equal(got["sum"], wanted["sum"])
    assert len(rewritten(reports)) == 1


def test_random_numbers_are_drawn_as_often_and_in_the_same_order() -> None:
    model = Decoder(2, between=lambda x: F.dropout(x, 0.5, True))
    fast, reports = compiled(model)
    with torch.no_grad():
        torch.manual_seed(3)
        wanted, state = model(X), torch.get_rng_state()
        torch.manual_seed(3)
        assert torch.equal(fast(X), wanted)
    assert torch.equal(torch.get_rng_state(), state)
    assert rewritten(reports)


def test_a_rewrite_that_fails_leaves_the_graph_as_it_is_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("broken on purpose")

    monkeypatch.setattr("hybrid_fx.backend.compile.graft", broken)
    with torch.no_grad():
        before, after = handed_over(Decoder(), X)
        assert after is before
        _, report = rewrite(before, BackendOptions())
    assert report.failure == "KeyError: 'broken on purpose'"


def test_the_same_graph_is_rewritten_the_same_way_twice() -> None:
    with torch.no_grad():
        before, after = handed_over(Decoder(2), X)
        again, _ = rewrite(before, BackendOptions())
        more, report = rewrite(after, BackendOptions())
    assert lines(again) == lines(after)
    assert more is after, "a second run changes nothing"
    assert report.replaced == 0
    assert operator.add in {node.target for node in after.graph.nodes}
