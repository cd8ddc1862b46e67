"""The example trains and generates as it does without the backend."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from hybrid_fx.backend import hybrid_fx

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "compile_backend.py"


def test_the_example_gives_the_losses_and_tokens_of_eager(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "hybrid_fx" not in torch._dynamo.list_backends():  # a checkout that is not installed
        torch._dynamo.register_backend(hybrid_fx, name="hybrid_fx")
    main = runpy.run_path(str(EXAMPLE))["main"]
    torch._dynamo.reset()
    losses, tokens = main()
    said = capsys.readouterr().out
    torch._dynamo.reset()
    plain_losses, plain_tokens = main("eager")
    assert losses == plain_losses
    assert torch.equal(tokens, plain_tokens)
    assert "training graph" in said
    assert "inference graph" in said
    assert said.count("2 of 2 layers fit a policy") >= 2
