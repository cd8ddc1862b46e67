"""Draws: those of multinomial for any rows that still run, and those of each sequence's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate.same_as_hf import EOS, is_fast, prompt, run, shared_model
from hypothesis import given
from hypothesis import strategies as st

from hybrid_fx.generate import generate, hf_draws
from hybrid_fx.generate.hf_draws import HFDraws, noise_is_drawn_in_order
from hybrid_fx.generate.own_draws import OwnDraws, inverse, uniform

ROWS = prompt((3, 9, 1, 6))


def test_this_torch_makes_noise_from_one_uniform_an_element() -> None:
    assert noise_is_drawn_in_order()
    for size in (1, 7, 8, 15, 16, 17, 1000, 70_001):
        torch.manual_seed(size)
        noise = torch.empty(3, size).exponential_()
        state = torch.get_rng_state()
        torch.manual_seed(size)
        rows = [torch.empty(size, dtype=torch.float64).uniform_() for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal((-torch.log1p(-torch.stack(rows))).float(), noise)
        torch.manual_seed(size)
        torch.empty(3 * size, dtype=torch.int64).random_()
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("chunk", [1, 40, 2**18])
@given(
    size=st.sampled_from([1, 2, 15, 16, 17, 61, 1000]),
    batch=st.integers(1, 7),
    data=st.data(),
)
def test_any_rows_draw_what_they_draw_among_all(
    in_order: bool, chunk: int, size: int, batch: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 9))
    steps = data.draw(
        st.lists(
            st.lists(st.integers(0, batch - 1), min_size=1, unique=True), min_size=1, max_size=3
        )
    )
    scores = torch.randn(3, batch, size, generator=torch.Generator().manual_seed(seed)) * 3
    scores[:, :, ::4] = -torch.inf
    scores[:, :, -1] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_draws, "_CHUNK", chunk)
        patch.setattr(hf_draws, "noise_is_drawn_in_order", lambda: in_order)
        torch.manual_seed(seed)
        wanted = [
            torch.multinomial(scores[step].softmax(-1), 1).squeeze(1)[rows]
            for step, rows in enumerate(steps)
        ]
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        draws = HFDraws(batch)
        found = [draws(scores[step][rows], rows) for step, rows in enumerate(steps)]
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in wanted]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("make", [lambda: HFDraws(4), OwnDraws])
def test_draws_are_made_where_the_scores_are_whatever_the_default_device(
    monkeypatch: pytest.MonkeyPatch, make: Any, in_order: bool
) -> None:
    monkeypatch.setattr(hf_draws, "noise_is_drawn_in_order", lambda: in_order)
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    found = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(default):
            found.append(make()(scores, [0, 3, 1]).tolist())
    assert found[0] == found[1]


def test_rows_are_copied_to_the_device_when_they_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[list[int]] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied.append(tensor.tolist())
        return tensor.to(device)

    monkeypatch.setattr(hf_draws, "to_device", to_device)
    monkeypatch.setattr(hf_draws, "noise_is_drawn_in_order", lambda: False)
    draws, rows = HFDraws(4), [0, 1, 2, 3]
    for gone in (None, None, 2, None, 0, None):
        rows = [row for row in rows if row != gone]
        draws(torch.zeros(len(rows), 5), rows)
    assert copied == [[0, 1, 3], [1, 3]]


@pytest.mark.parametrize("make", [lambda: HFDraws(2), OwnDraws])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_scores_that_are_no_distribution_are_refused_in_torchs_words(make: Any, bad: Any) -> None:
    scores = torch.zeros(2, 5)
    if bad is None:
        scores[1] = -torch.inf
    else:
        scores[1, 3] = bad
    with pytest.raises(RuntimeError) as by_torch:
        torch.multinomial(scores.softmax(-1), 1)
    draws, before = make(), torch.get_rng_state()
    with pytest.raises(RuntimeError) as by_us:
        draws(scores, [0, 1])
    assert str(by_us.value) == str(by_torch.value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [5, 512, 1300])
def test_own_draws_are_as_frequent_as_the_probabilities(size: int) -> None:
    """Chi-square over the likeliest tokens and the rest, at about 1 in 10**4 by chance."""
    torch.manual_seed(0)
    scores = torch.randn(size) * 3
    scores[::3] = -torch.inf
    p = scores.softmax(-1).double()
    rows, steps = 500, 40
    draws = OwnDraws()
    counts = torch.zeros(size, dtype=torch.float64)
    for _ in range(steps):
        counts += draws(scores.expand(rows, -1), range(rows)).bincount(minlength=size)
    assert counts[p == 0].sum() == 0
    kept = p.topk(min(20, int((p > 0).sum()) - 1)).indices
    wanted = torch.cat((p[kept], 1 - p[kept].sum(0, keepdim=True))) * rows * steps
    found = torch.cat((counts[kept], (rows * steps - counts[kept].sum(0, keepdim=True))))
    freedom = len(kept)
    assert ((found - wanted) ** 2 / wanted).sum() < freedom + 4 * (2 * freedom) ** 0.5 + 8


@given(
    size=st.sampled_from([1, 3, 511, 512, 513, 1024, 1500]),
    kept=st.lists(st.integers(0, 10_000), min_size=1, max_size=6),
    u=st.sampled_from([0.0, 2.0**-53, 0.25, 0.5, 1 - 2.0**-53]) | st.floats(0, 1, exclude_max=True),
    tiny=st.booleans(),
)
def test_a_token_without_probability_is_never_drawn(
    size: int, kept: list[int], u: float, tiny: bool
) -> None:
    p = torch.zeros(2, size)
    p[0, [k % size for k in kept]] = torch.rand(len(kept)).clamp_min(0.01)
    p[1] = p[0]
    if tiny:
        p[1] *= 1e-30
    tokens = inverse(p, torch.tensor([u, u], dtype=torch.float64))
    assert (p.gather(1, tokens[:, None]) > 0).all()
    share = (p[0].double().cumsum(0) / p[0].double().sum())[tokens[0]]
    before = share - p[0, tokens[0]].double() / p[0].double().sum()
    assert before - 1e-6 <= u <= share + 1e-6


def test_the_first_and_the_last_token_are_reached() -> None:
    p = torch.full((2, 1300), 1 / 1300)
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert inverse(p, u).tolist() == [0, 1299]


def test_own_numbers_are_even_and_differ_by_seed_row_and_step() -> None:
    numbers = torch.tensor(
        [uniform(seed, row, step) for seed in (0, 1) for row in range(50) for step in range(100)],
        dtype=torch.float64,
    )
    assert len(numbers.unique()) == len(numbers)
    assert 0 <= float(numbers.min()) < 0.001 < 0.999 < float(numbers.max()) < 1
    assert (torch.histc(numbers, 10, 0, 1) - 1000).abs().max() < 150
    by_step = numbers.view(100, 100)
    assert torch.corrcoef(by_step).fill_diagonal_(0).abs().max() < 0.5


def own(rows: dict[str, Any], **asked: Any) -> Any:
    """Sampled per sequence by hybrid_fx."""
    settings = {"do_sample": True, "max_new_tokens": 12, "top_k": 0, **asked}
    watched = run(shared_model(), **rows, **settings).runner.runner  # a runtime under test
    torch.manual_seed(5)
    return generate(
        shared_model(),
        watched,
        (),
        {**rows, **settings},
        on_fallback=print,
        sampling="per_sequence",
    )


def test_a_sequence_draws_the_same_whoever_stands_beside_it() -> None:
    """Up to the bits of its logits: a batch of another size may sum in another order."""
    two = own({"input_ids": ROWS["input_ids"][1:3, -1:].repeat(1, 4)}, eos_token_id=None)
    more = own(
        {
            "input_ids": torch.cat((ROWS["input_ids"][1:3, -1:], torch.tensor([[7], [9]]))).repeat(
                1, 4
            )
        },
        eos_token_id=list(range(30)),
        pad_token_id=0,
    )
    for row in range(2):
        ended = torch.isin(more[row, 4:], torch.arange(30)).tolist()
        until = 4 + (ended.index(True) + 1 if True in ended else len(ended))
        assert more[row, :until].tolist() == two[row, :until].tolist()
    assert two[0].tolist() != two[1].tolist()


def test_the_seed_counts_and_one_number_is_taken_off_the_generator() -> None:
    first, second = (own(ROWS) for _ in range(2))
    state = torch.get_rng_state()
    assert torch.equal(first, second)
    torch.manual_seed(5)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_search_and_beams_are_as_ever() -> None:
    model = shared_model()
    for asked in ({"do_sample": False}, {"do_sample": True, "num_beams": 2}):
        torch.manual_seed(5)
        wanted = model.generate(**ROWS, max_new_tokens=12, top_k=0, **asked)
        assert torch.equal(own(ROWS, **asked), wanted)


def test_rows_that_are_alike_draw_different_tokens() -> None:
    ids = prompt((5,))["input_ids"]
    result = own({"input_ids": ids}, num_return_sequences=4, eos_token_id=None)
    assert len({tuple(row) for row in result.tolist()}) == 4


def test_a_filter_keeps_its_tokens_out() -> None:
    kept = {"suppress_tokens": list(range(10, 50)), "eos_token_id": EOS}
    result = own(ROWS, **kept)[:, 9:]
    assert not torch.isin(result, torch.arange(10, 50)).any()
    assert is_fast(run(shared_model(), **ROWS, max_new_tokens=2))
