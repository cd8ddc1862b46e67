"""``graph="inductor"``: the same tokens, and one graph of a layer for all layers and all sizes."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_models import prompt, reweigh, tiny
from torch._dynamo.utils import counters

import hybrid_fx

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, g++"),
]

#: Prompt lengths and new tokens.
USUAL = (((5, 5), 8), ((6, 6, 6), 3), ((2, 2, 2, 2, 2), 12), ((4, 4), 40))
PADDED = (((5, 3), 8), ((1, 7, 2, 3), 11))
ALONE = (((7,), 5), ((3,), 20))


def graphs_of(engine, calls):
    """Graphs that Dynamo made during ``calls``; each gave the tokens of transformers."""
    before = counters["stats"]["unique_graphs"]
    for lengths, new in calls:
        call = {**prompt(lengths, seed=new), "max_new_tokens": new, "do_sample": False}
        expected = engine._plain_generate(**call)
        assert torch.equal(engine.generate(**call), expected), (lengths, new)
    assert engine.stats.fallbacks == {}
    return counters["stats"]["unique_graphs"] - before


@pytest.mark.parametrize(
    ("kind", "layers"), [("llama", 2), ("llama", 4), ("gpt2", 2), ("opt", 2), ("mistral", 2)]
)
def test_a_layer_is_compiled_once_for_all_layers_and_all_sizes(kind, layers):
    torch._dynamo.reset()
    model = tiny(kind, layers=layers)
    engine = hybrid_fx.hybridize(model, graph="inductor", disk_cache=False)
    before = counters["stats"]["unique_graphs"]
    engine.explain()
    capture = 1
    assert counters["stats"]["unique_graphs"] - before == capture + 2
    # A window is either not yet full or cut off: decode has one more graph of each kind.
    windows = kind == "mistral"
    assert 0 <= graphs_of(engine, USUAL) <= windows
    assert 2 <= graphs_of(engine, PADDED) <= 2 + windows
    assert graphs_of(engine, ALONE) <= 2 + windows
    assert graphs_of(engine, USUAL + PADDED + ALONE) == 0
    for seed in (1, 2):  # another weight version is no reason to compile
        reweigh(model, seed)
        assert graphs_of(engine, USUAL[:2]) == 0
    assert engine.stats.counters["prepares"] == 3


def test_the_right_tokens_come_where_a_function_does_not_compile(monkeypatch):
    from hybrid_fx.engine import runners

    def no_compiler(function):
        def lowered(*_):
            raise RuntimeError("no C++ compiler")

        return lowered

    monkeypatch.setattr(runners, "by_inductor", no_compiler)
    engine = hybrid_fx.hybridize(tiny("llama"), graph="inductor", disk_cache=False)
    call = {**prompt((5, 3)), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(engine.generate(**call), engine._plain_generate(**call))
    (reason,) = engine.stats.fallbacks
    assert "no C++ compiler" in reason
