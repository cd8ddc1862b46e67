"""The first of the largest numbers of a row, found in blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_fx.generate.largest import first_largest


@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 9000) | st.sampled_from([4095, 4096, 4097, 4223, 4224, 151936]),
    kinds=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
    special=st.lists(
        st.tuples(
            st.integers(0, 4), st.integers(0, 151935), st.sampled_from(["nan", "inf", "-inf"])
        ),
        max_size=3,
    ),
)
def test_it_is_where_argmax_finds_it(
    rows: int, width: int, kinds: int, seed: int, special: list[tuple[int, int, str]]
) -> None:
    """Few kinds of numbers: the largest stands in many places of a row."""
    scores = torch.randint(kinds, (rows, width), generator=torch.Generator().manual_seed(seed))
    scores = scores.float() - kinds / 2
    for row, column, value in special:
        if row < rows:
            scores[row, column % width] = float(value)
    assert torch.equal(first_largest(scores), scores.argmax(-1))


@pytest.mark.parametrize("width", [128 * 32, 128 * 40 + 1, 128 * 40 + 127])
def test_every_place_of_a_row_is_found(width: int) -> None:
    places = [0, 127, 128, width // 2, width - 129, width - 128, width - 127, width - 1]
    scores = torch.zeros(len(places), width)
    for row, place in enumerate(places):
        scores[row, place] = 1.0
    assert first_largest(scores).tolist() == places
    assert first_largest(-torch.inf + torch.zeros(2, width)).tolist() == [0, 0]
    assert first_largest(scores.t().contiguous().t()).tolist() == places  # rows no runs of memory
