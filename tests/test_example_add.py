"""The examples that extend the rewriting library run, and say what they promise."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import tiny

import hybrid_fx
from hybrid_fx.passes.contract import Pass

ROOT = Path(__file__).parent.parent


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40, "short"
    assert max(map(len, text.splitlines())) <= 115, "readable"
    return text


def test_a_pass_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    found = _example("add_a_pass").main()
    assert found["places"] == 4
    assert found["error"] < 1e-6
    assert found["same"] == 1.0
    text = _said(capsys)
    assert re.search(r"^- mul_\d+: .*= mul\(attn_output_1, 0.22\)$", text, re.M)
    assert re.search(
        r"^\+ .*= mul\(self_attn.o_proj.weight, 0.22\)  in self_attn.o_proj$", text, re.M
    )
    order = re.findall(r"^  (\w+) +\d+ places$", text, re.M)
    assert order.index("fold_scale") + 1 == order.index("fuse_mlp")
    assert "{'prepare': 2, 'prefill': 0, 'decode': 0}" in text, "one function for both layers"


def test_a_policy_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    found = _example("add_a_policy").main()
    assert found["without"] == (0, ("residual + norm",), True)
    assert found["with"] == (2, ("mlp", "residual + norm"), True)
    assert "q at gpt_neox.layers.0: expected a call in self_attn.q_proj, found none" in _said(
        capsys
    )


def test_the_blocks_of_the_passes_readme_run() -> None:
    text = (ROOT / "passes" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {"hybrid_fx": hybrid_fx, "model": tiny("llama")}
    for block in blocks:
        exec(compile(block, "passes/README.md", "exec"), names)
    assert isinstance(names["DROP_DOUBLE_NEG"], Pass)
    rows = names["engine"].explain(passes=True).passes
    assert "drop_double_neg" in [row.name for row in rows]
    names["engine"].close()
