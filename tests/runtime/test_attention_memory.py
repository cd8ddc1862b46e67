"""Attention over the workspace, against attention written out in float64.

Legend: B batch, T new tokens, S positions in use, H heads, K kv heads, D head size.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hybrid_fx.passes import attention
from hybrid_fx.passes.attention import attend, attend_one


def written_out(query, keys, values, valid, scale, window, softcap, sinks):
    """Row by row, head by head: query [B,H,T,D], keys and values [B,K,S,D], valid [B,S]."""
    batch, heads, tokens, _ = query.shape
    length = keys.shape[2]
    out = torch.zeros(batch, tokens, heads, values.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h * keys.shape[1] // heads
            for t in range(tokens):
                at = length - tokens + t
                seen = [
                    s
                    for s in range(at + 1)
                    if (not window or s > at - window) and (valid is None or valid[b, s] or s == at)
                ]
                scores = [float(query[b, h, t] @ keys[b, kv, s]) * scale for s in seen]
                if softcap:
                    scores = [math.tanh(score / softcap) * softcap for score in scores]
                if sinks is not None:
                    scores.append(float(sinks[h]))
                weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
                for weight, s in zip(weights, seen, strict=False):
                    out[b, t, h] += weight * values[b, kv, s]
    return out


def at(slot, pitch):
    """Where a slot stands in memory [R, K, P, D]."""
    return int(slot) // pitch, slice(None), int(slot) % pitch


class Case:
    """Random operands; the first S - T positions stand in memory already."""

    def __init__(self, seed, batch, kv_heads, groups, past, tokens, padded, sinks):
        rng = torch.Generator().manual_seed(seed)

        def rand(*shape):
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        self.length = past + tokens
        self.query = rand(batch, kv_heads * groups, tokens, 4)
        self.keys = rand(batch, kv_heads, self.length, 4)
        self.values = rand(batch, kv_heads, self.length, 6)
        self.sinks = rand(kv_heads * groups) if sinks else None
        self.valid = None
        if padded:
            pads = torch.randint(0, self.length + 1, (batch, 1), generator=rng)
            self.valid = torch.arange(self.length) >= pads
        self.past, self.tokens, self.batch = past, tokens, batch

    def memory(self, slots, pitch, spare):
        """Key and value memory with the past at its slots; what no row owns is not a number."""
        pair = []
        for source in (self.keys, self.values):
            wide = pitch or 3
            rows = (int(slots.max()) + spare) // wide + 1
            shape = (rows, source.shape[1], wide, source.shape[3])
            memory = torch.full(shape, math.nan, dtype=torch.float64)
            for b in range(self.batch):
                for s in range(self.past):
                    memory[at(slots[b, s], wide)] = source[b, :, s]
            pair.append(memory)
        return pair

    def run(self, operator, slots, pitch, spare=0, **options):
        memory = self.memory(slots, pitch, spare)
        new = slice(self.past, None)
        out = operator(
            self.query,
            self.keys[:, :, new].contiguous(),
            self.values[:, :, new].contiguous(),
            *memory,
            slots,
            self.valid,
            pitch,
            **options,
            sinks=self.sinks,
        )
        return out, memory


cases = st.builds(
    Case,
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    past=st.integers(0, 6),
    tokens=st.integers(1, 4),
    padded=st.booleans(),
    sinks=st.booleans(),
)
options = st.fixed_dictionaries(
    {
        "scale": st.sampled_from([0.5, 1.0]),
        "window": st.sampled_from([0, 1, 2, 3, 50]),
        "softcap": st.sampled_from([0.0, 2.0]),
    }
)


def contiguous(case, extra=0):
    pitch = case.length + extra
    return torch.arange(case.batch)[:, None] * pitch + torch.arange(case.length), pitch


def meant(case, operator):
    """Which queries [B, T] have a meaning: what ``attend_one`` makes of padding is only finite."""
    everything = torch.ones(case.batch, case.tokens, dtype=torch.bool)
    if case.valid is None or operator is attend:
        return everything
    return case.valid[:, case.past :]


def check(case, operator, slots, pitch, options, spare=0):
    wanted = written_out(
        case.query, case.keys, case.values, case.valid, sinks=case.sinks, **options
    )
    out, memory = case.run(operator, slots, pitch, spare, **options)
    assert out.isfinite().all()
    here = meant(case, operator)
    # Weights are rounded to float32 on the way where scores are softmaxed in it.
    torch.testing.assert_close(out[here], wanted[here], rtol=1e-5, atol=1e-6)
    for held, source in zip(memory, (case.keys, case.values), strict=True):
        for b in range(case.batch):
            for s in range(case.length):
                assert torch.equal(held[at(slots[b, s], held.shape[2])], source[b, :, s])


@given(cases, options, st.integers(0, 3))
@example(Case(0, 2, 1, 2, 0, 3, True, False), {"scale": 1.0, "window": 0, "softcap": 0.0}, 1)
def test_attention_over_rows_in_a_line_is_the_written_out_one(case, options, extra):
    slots, pitch = contiguous(case, extra)
    check(case, attend, slots, pitch, options, spare=extra)
    if case.tokens == 1:
        check(case, attend_one, slots, pitch, options, spare=extra)


@given(cases, options, st.integers(0, 5))
def test_attention_over_scattered_slots_is_the_written_out_one(case, options, spare):
    rng = torch.Generator().manual_seed(spare)
    order = torch.randperm(case.batch * case.length + spare, generator=rng)
    slots = order[: case.batch * case.length].view(case.batch, case.length)
    check(case, attend, slots, 0, options, spare)
    if case.tokens == 1:
        check(case, attend_one, slots, 0, options, spare)


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_may_read_a_prefix_that_another_row_wrote(tokens):
    case = Case(1, 3, 2, 2, 5, tokens, False, False)
    case.keys[:, :, :4] = case.keys[:1, :, :4]
    case.values[:, :, :4] = case.values[:1, :, :4]
    shared = torch.arange(4).expand(3, 4)
    own = 4 + torch.arange(3 * (case.length - 4)).view(3, -1).flip(0)
    slots = torch.cat((shared, own), 1)
    plain = {"scale": 0.5, "window": 0, "softcap": 0.0}
    for operator in (attend, attend_one)[: 2 if tokens == 1 else 1]:
        check(case, operator, slots, 0, plain)


@given(cases, options)
def test_what_stands_in_a_padded_slot_never_shows(case, options):
    assume(case.valid is not None)
    slots, pitch = contiguous(case)
    clean, _ = case.run(attend, slots, pitch, **options)
    past = (~case.valid[:, : case.past])[:, None, :, None]
    for source in (case.keys, case.values):
        source[:, :, : case.past].masked_fill_(past, 1e30)
    for operator in (attend, attend_one)[: 2 if case.tokens == 1 else 1]:
        dirty, _ = case.run(operator, slots, pitch, **options)
        assert dirty.isfinite().all()
        here = meant(case, operator)
        torch.testing.assert_close(dirty[here], clean[here], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_decode_step_on_a_cpu_multiplies_nothing_by_the_number_of_positions(
    padded, groups, monkeypatch
):
    """oneDNN keeps a kernel for each shape of a product in bfloat16."""

    def no_product(*_):
        raise AssertionError("a product of a shape of its own")

    monkeypatch.setattr(attention, "attend_few", no_product)
    case = Case(0, 2, 2, groups, 6, 1, padded, False)
    slots, pitch = contiguous(case)
    plain = {"scale": 0.5, "window": 0, "softcap": 0.0}
    check(case, attend_one, slots, pitch, plain)
