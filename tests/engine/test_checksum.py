"""The checksum of tensors: any single change and any permutation is noticed, layout is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hybrid_fx.engine import checksum
from hybrid_fx.engine.checksum import checksums

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64]
SIZES = st.integers(1, 9000)  # up to four rows of float32 words and a remainder


def random(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) * 20).to(dtype)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@given(size=SIZES, dtype=st.sampled_from(DTYPES), where=st.integers(0), bit=st.integers(0, 7))
@example(size=1, dtype=torch.int8, where=0, bit=7)
@example(size=4084, dtype=torch.float32, where=4 * 4084 - 1, bit=7)  # a sign, the last of a row
def test_any_flipped_bit_is_noticed(size: int, dtype: torch.dtype, where: int, bit: int) -> None:
    tensor = random(size, dtype)
    changed = tensor.clone()
    as_bytes(changed)[where % as_bytes(changed).numel()] ^= 1 << bit
    before, same, after = checksums([tensor, tensor.clone(), changed])
    assert before == same != after


@given(size=SIZES, dtype=st.sampled_from(DTYPES), one=st.integers(0), two=st.integers(0))
@example(size=9000, dtype=torch.float32, one=0, two=1)
@example(size=9000, dtype=torch.float32, one=0, two=2042)  # the same column of two rows
def test_two_exchanged_elements_are_noticed(
    size: int, dtype: torch.dtype, one: int, two: int
) -> None:
    tensor = random(size, dtype)
    one, two = one % size, two % size
    changed = tensor.clone()
    changed[[one, two]] = changed[[two, one]]
    before, after = checksums([tensor, changed])
    assert (before == after) == torch.equal(tensor, changed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_permuted_rows_and_columns_are_noticed(dtype: torch.dtype, dim: int) -> None:
    matrix = random(96 * 128, dtype).view(96, 128)
    before, rolled, flipped = checksums([matrix, matrix.roll(1, dim), matrix.flip(dim)])
    assert len({before, rolled, flipped}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_negated_tensor_is_noticed(dtype: torch.dtype) -> None:
    for size in (3, 1021, 8000, 50_000):
        tensor = random(size, dtype)
        before, after = checksums([tensor, -tensor])
        assert before != after


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_the_memory_layout_does_not_matter(dtype: torch.dtype) -> None:
    matrix = random(37 * 61, torch.float32).to(dtype).view(37, 61)
    transposed = matrix.t().contiguous().t()
    shifted = torch.empty(37 * 61 + 1, dtype=dtype)[1:].view(37, 61).copy_(matrix)
    expected, *others = checksums([matrix, transposed, shifted])
    assert others == [expected, expected]


def test_the_path_without_integer_mv_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(-(2**62), 2**62, (50, 1021))
    weights = checksum._weights(1021, rows.device)
    expected = checksum._row_sums(rows, weights)
    monkeypatch.setattr(checksum, "_CHUNK", 7)
    assert torch.equal(checksum._weighted_rows(rows, weights), expected)


def test_nothing_to_read_is_zero_and_order_is_kept() -> None:
    one = random(100, torch.float32)
    empty, meta = torch.empty(0), torch.empty(3, device="meta")
    sums = checksums([empty, one, meta, torch.eye(2).to_sparse()])
    assert [sums[0], *sums[2:]] == [0, 0, 0]
    assert sums[1] == checksums([one])[0] != 0
    assert checksums([]) == []


def test_reading_changes_nothing() -> None:
    tensor = random(5000, torch.float32).requires_grad_()
    before, version = tensor.detach().clone(), tensor._version
    checksums([tensor])
    assert torch.equal(tensor, before)
    assert tensor._version == version
    assert tensor.grad_fn is None
