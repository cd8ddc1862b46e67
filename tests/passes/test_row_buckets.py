"""Few numbers of rows reach the kernels of packed weights, and every row stays what it is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_fx.passes import packing
from hybrid_fx.passes.kernels import gated_mlp, plain_mlp, split_gated_mlp
from hybrid_fx.passes.packing import pack, packed_linear, packs
from hybrid_fx.passes.row_buckets import MOST, bucket, by_rows

LENGTHS = (1, 7, 8, 9, 63, 64, 65, 100, 511, 512, 513, 520, 1023, 1024, 1300)
DTYPES = [torch.float32, torch.bfloat16]


def skip_unpacked(dtype: torch.dtype) -> None:
    if not packs(torch.device("cpu"), dtype):
        pytest.skip(f"this processor has no oneDNN products in {dtype}")


def test_any_number_of_rows_runs_on_one_of_39() -> None:
    numbers = {bucket(rows) for rows in range(1, MOST + 1)}
    assert len(numbers) == 39
    for rows in range(1, MOST + 1):
        assert rows <= bucket(rows) <= max(rows, min(rows + 7, MOST), math.ceil(rows * 9 / 8))
        assert bucket(bucket(rows)) == bucket(rows)
    assert all(bucket(rows) == rows for rows in range(1, 9))


def test_on_average_two_percent_more_rows_are_computed() -> None:
    computed = []
    for rows in range(100, 1301):
        seen: list[int] = []
        by_rows(lambda part, seen=seen: (seen.append(len(part)), part)[1], torch.zeros(rows, 1))
        assert rows <= sum(seen) <= rows + bucket(rows % MOST or MOST) - (rows % MOST or MOST)
        assert set(seen) <= {bucket(n) for n in range(1, MOST + 1)}
        computed.append(sum(seen) / rows)
    assert sum(computed) / len(computed) < 1.025


@pytest.mark.parametrize("rows", LENGTHS)
def test_what_fills_rows_up_reaches_no_result(rows: int) -> None:
    x = torch.randn(rows, 6)

    def product(part: torch.Tensor) -> torch.Tensor:
        return torch.where((part == 0).all(1, keepdim=True), torch.nan, part)[:, :5]

    assert torch.equal(by_rows(product, x), x[:, :5])
    apart = torch.randn(rows, 12)[:, ::2]
    assert torch.equal(by_rows(product, apart), apart[:, :5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", LENGTHS)
def test_a_product_of_any_rows_is_the_product(rows: int, dtype: torch.dtype) -> None:
    skip_unpacked(dtype)
    rng = torch.Generator().manual_seed(rows)
    weight, bias = (torch.randn(*size, generator=rng).to(dtype) for size in ((37, 24), (37,)))
    x = torch.randn(rows, 1, 24, generator=rng).to(dtype)
    x[rows // 2] = torch.nan
    found = packed_linear(x, pack(weight), bias)
    wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert found.shape == (rows, 1, 37)
    assert found.is_contiguous()
    scale = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), wanted, rtol=scale, atol=scale, equal_nan=True)


def test_a_row_in_float32_is_the_same_bits_beside_any_others() -> None:
    skip_unpacked(torch.float32)
    rng = torch.Generator().manual_seed(0)
    weight, x = pack(torch.randn(96, 64, generator=rng)), torch.randn(1300, 64, generator=rng)
    whole = packed_linear(x, weight, None)
    for rows in LENGTHS[2:]:
        assert torch.equal(packed_linear(x[:rows], weight, None), whole[:rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_lengths_bring_few_numbers_of_rows_to_the_kernel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unpacked(dtype)
    seen: set[tuple[int, ...]] = set()
    kernel = packing._product

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.add((x.numel() // x.shape[-1], *weight.shape))
        return kernel(x, weight, bias)

    monkeypatch.setattr(packing, "_product", counted)
    weights = [torch.randn(*shape).to(dtype) for shape in ((32, 8), (16, 8), (8, 16))]
    gate_up, up, down = map(pack, weights)
    for rows in range(1, 1400, 3):
        x = torch.randn(1, rows, 8).to(dtype)
        gated_mlp(x, gate_up, None, down, None, "silu")
        split_gated_mlp(x, up, None, up, None, down, None, "silu")
        plain_mlp(x, up, None, down, None, "gelu")
        packed_linear(x, up, None)
    assert len(seen) == 3 * 39


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads VmRSS from /proc/self/status: Linux only"
)
def test_memory_does_not_grow_with_the_numbers_of_rows() -> None:
    """Unbounded, 100 numbers of rows hold 50 MiB more."""
    skip_unpacked(torch.float32)
    script = Path(__file__).with_name("row_memory.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before, most = json.loads(done.stdout.splitlines()[-1])
    assert most - before < 10, f"{before:.0f} MiB, then {most:.0f}"
