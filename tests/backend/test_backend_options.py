"""Options are checked, strict names what is in the way, reports and the log say what happened."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from backend_models import Decoder, compiled
from tiny_models import prompt, tiny
from torch import Tensor, fx, nn
from torch._dynamo.backends import registry

from hybrid_fx.backend import BackendOptions, hybrid_fx
from hybrid_fx.backend.options import make_options
from hybrid_fx.errors import ConfigError, StrictError
from hybrid_fx.passes.contract import Context, Pass, PassResult
from hybrid_fx.passes.graph import calls
from hybrid_fx.passes.operators import OPERATORS

X = torch.ones(2, 3, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"iner": "eager"}, "did you mean 'inner'"),
        ({"inner": "cudagraphs"}, "use one of eager, aot_eager, inductor"),
        ({"passes": ("fuse_mpl",)}, "did you mean 'fuse_mlp'"),
        ({"passes": "fuse_mlp"}, "must be a tuple"),
        ({"strict": 1}, "must be True or False"),
        ({"report": "yes"}, "function of one GraphReport"),
        ({"policies": ("llama",)}, "is no Policy"),
        (["strict"], "pass a dict"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_options(options)


def test_a_pass_that_needs_inputs_of_its_own_is_refused() -> None:
    own = Pass("own", lambda graph, context: PassResult(0), inputs=frozenset({"keep"}))
    with pytest.raises(ConfigError, match="adds the inputs keep"):
        BackendOptions(passes=(own,))


def test_the_error_reaches_who_calls_the_compiled_model() -> None:
    torch._dynamo.reset()
    fast = torch.compile(Decoder(), backend=hybrid_fx, options={"strikt": True})
    with pytest.raises(Exception, match="did you mean 'strict'") as raised:
        fast(X)
    assert isinstance(raised.value.inner_exception, ConfigError)


def test_a_mode_is_inductors(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def inductor(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        told.append(options)
        return gm

    torch._dynamo.reset()
    model = Decoder()
    fast = torch.compile(model, backend=hybrid_fx, mode="max-autotune-no-cudagraphs")
    monkeypatch.setattr(registry, "lookup_backend", {"inductor": inductor}.__getitem__)
    assert torch.equal(fast(X), model(X))
    assert [options["config_patches"]["max_autotune"] for options in told] == [True]


@pytest.mark.deep
def test_a_mode_is_inductors_for_real() -> None:
    torch._dynamo.reset()
    model = Decoder()
    fast = torch.compile(model, backend=hybrid_fx, mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))


def test_a_pass_of_ones_own_runs_where_it_fits_and_in_the_modes_it_is_for() -> None:
    def double(graph: fx.Graph, context: Context) -> PassResult:
        found = calls(graph, "silu")
        for node in found:
            node.target = OPERATORS["relu"]
        return PassResult(len(found))

    own = Pass("relu_for_silu", double, may_add=frozenset({"relu"}))
    model = Decoder()
    fast, reports = compiled(model, passes=(own,))
    with torch.no_grad():
        assert not torch.equal(fast(X), model(X))
    assert torch.equal(fast(X), model(X)), "it is not for training"
    assert [report.passes for report in reports] == [{"relu_for_silu": 1}, {}]


class _Attending(nn.Module):
    """Layers with attention that no policy describes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(x, x, x)
        for layer in self.layers:
            y = layer(y)
        return y


def test_strict_passes_where_all_is_rewritten_and_where_there_are_no_layers() -> None:
    model = tiny("llama", layers=1)
    fast, reports = compiled(model, strict=True)
    ids = prompt([4])["input_ids"]
    with torch.no_grad():
        assert torch.equal(fast(input_ids=ids).logits, model(input_ids=ids).logits)
    assert reports[0].layers[0].policy == "llama"
    fast, _ = compiled(_Attending(), strict=True)
    fast(X)


def test_strict_names_the_layer_the_node_and_what_was_expected() -> None:
    model = tiny("bloom", layers=1)
    fast, _ = compiled(model, strict=True)
    with pytest.raises(Exception, match="expected") as raised:
        fast(input_ids=prompt([4])["input_ids"])
    error = raised.value.inner_exception
    assert isinstance(error, StrictError)
    assert "transformer.h.0" in str(error)
    assert "strict=False" in str(error)


def test_the_log_has_a_line_for_each_graph_and_one_for_each_miss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny("bloom", layers=1)
    fast, (*_,) = compiled(model)
    with caplog.at_level(logging.DEBUG, "hybrid_fx"), torch.no_grad():
        fast(input_ids=prompt([4])["input_ids"])
    ours = [record for record in caplog.records if record.name == "hybrid_fx"]
    (line,) = (record.message for record in ours if record.levelno == logging.INFO)
    assert line.startswith("inference graph of")
    assert "0 of 1 layers fit a policy; fuse_add_norm 1; " in line
    assert any("transformer.h.0: mlp at" in record.message for record in ours)
