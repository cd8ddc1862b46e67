"""Ranks that generate together: each one's logits are those of its own rows alone.

Legend: B batch, T tokens, S positions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tensor_parallel import plans, tensors_of
from threaded_ranks import Rank, on_ranks
from tiny_models import VOCAB, tiny

from hybrid_fx.errors import EngineBusyError, EngineClosedError, InputError
from hybrid_fx.runtime import PlanRunner
from hybrid_fx.runtime.joint import JointRunner
from hybrid_fx.runtime.turn import Turn, count_of

CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # float32, summed in another order


@dataclass(frozen=True)
class Step:
    """New columns: how many, which of them are padding in row 0, and what happens before."""

    width: int
    padding: int = 0
    keep: int = 1
    rows: tuple[int, ...] | None = None
    crop: int = 0
    again: tuple[int, ...] | None = None


def timer(_: str) -> Any:
    return nullcontext(SimpleNamespace(tokens=0))


def play(session: Any, batch: int, steps: Sequence[Step], seed: int) -> list[Any]:
    """The logits of each step; tokens are drawn from ``seed``."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    try:
        for step in steps:
            for rows in (step.rows, step.again):
                if rows is not None:
                    session.reorder(torch.tensor(rows))
                    batch = len(rows)
            if step.crop:
                session.crop(max(1, session.length - step.crop))
            ids = torch.randint(VOCAB, (batch, step.width), generator=rng)
            positions = torch.arange(session.length, session.length + step.width)
            valid = None
            if step.padding:
                valid = torch.ones(batch, step.width, dtype=torch.bool)
                valid[0, : step.padding] = False
            keep = min(step.keep, step.width)
            found.append(session.forward(ids, positions.expand_as(ids), valid, keep=keep))
    finally:
        session.close()
    return found


@dataclass(frozen=True)
class Kind:
    """A model, its plan for one process, and its plans for several."""

    tensors: Any
    whole: Any
    cut: Any

    def runner(self, plan: Any, group: Rank | None) -> PlanRunner:
        runner = PlanRunner(plan, device=torch.device("cpu"), timer=timer, group=group)
        runner.prepare(self.tensors)
        return runner

    def alone(self, work: Sequence[tuple[int, Sequence[Step]]], seed: int) -> list[Any]:
        """What each session of one rank gives on the whole plan."""
        runner = self.runner(self.whole, None)
        return [
            play(runner.session(batch=batch, capacity=4), batch, steps, seed)
            for batch, steps in work
        ]

    def together(self, work: Sequence[Any]) -> list[Any]:
        """What all ranks get, each of its own sessions, one after the other."""

        def on(rank: Rank) -> Any:
            runner = self.runner(self.cut[len(work)][rank.rank], rank)
            joint = JointRunner(runner, rank, rank.rank, timer)
            with torch.no_grad():
                found = [
                    play(joint.session(batch=batch, capacity=4), batch, steps, rank.rank)
                    for batch, steps in work[rank.rank]
                ]
                rank.finish(joint.serve)
            return found

        return on_ranks(len(work), on)


@functools.cache
def kind(name: str) -> Kind:
    """Of a model by its name, made once."""
    model = tiny(name).eval()
    (whole,) = plans(model, 1)
    return Kind(tensors_of(model), whole, {size: plans(model, size) for size in (2, 3, 4)})


KINDS = ("gpt2", "llama", "mistral")


def check(one: Kind, work: Sequence[Any]) -> None:
    """The logits of all ranks are those of their rows alone."""
    for rank, found in enumerate(one.together(work)):
        with torch.no_grad():
            expected = one.alone(work[rank], rank)
        for mine, alone in zip(found, expected, strict=True):
            for a, b in zip(mine, alone, strict=True):
                torch.testing.assert_close(a, b, **CLOSE)


def prompt(width: int, steps: int, padding: int = 0) -> list[Step]:
    """A prompt and some tokens behind it."""
    return [Step(width, padding), *[Step(1)] * steps]


#: What each rank does: its sessions, as (rows, steps).
CASES: dict[str, list[list[tuple[int, list[Step]]]]] = {
    "alike": [[(2, prompt(4, 5))], [(2, prompt(4, 5))]],
    "rows": [[(3, prompt(4, 3))], [(1, prompt(4, 3))]],
    "widths": [[(2, prompt(7, 3))], [(1, prompt(3, 3))]],
    "widths and padding": [[(2, prompt(7, 4, 2))], [(2, prompt(5, 4, 3))]],
    "the first leaves early": [[(2, prompt(4, 1))], [(2, prompt(6, 9))], [(1, prompt(2, 5))]],
    "the last leaves early": [[(2, prompt(4, 9))], [(2, prompt(6, 1))]],
    "one has no rows": [[], [(2, prompt(3, 4))]],
    "one token to begin with": [[(2, prompt(1, 4))], [(2, prompt(5, 4))]],
    "beams": [
        [(2, [Step(4), Step(1, rows=(1, 0)), Step(1, rows=(0, 0, 1, 1)), Step(1, rows=(3, 1))])],
        [(2, prompt(6, 5))],
    ],
    "drafts": [
        [(1, [Step(4), Step(3, keep=3), Step(2, keep=2, crop=2), Step(4, keep=4, crop=1)])],
        [(2, prompt(6, 6))],
    ],
    "more logits for one": [[(2, [Step(4, keep=4), Step(1)])], [(1, prompt(4, 3))]],
    "moved twice": [[(3, [Step(4), Step(1, rows=(1, 2, 0), again=(2, 2))])], [(2, prompt(4, 4))]],
    "pieces of a prompt": [[(2, [Step(3), Step(3), Step(2), *prompt(1, 3)])], [(1, prompt(5, 7))]],
    "a second session": [[(2, prompt(4, 1)), (3, prompt(2, 4))], [(1, prompt(3, 7))]],
    "four": [[(1, prompt(2 + rank, 2 + rank))] for rank in range(4)],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("model", ["llama", pytest.param("mistral", marks=pytest.mark.deep)])
def test_the_logits_of_each_rank_are_those_of_its_rows_alone(model: str, name: str) -> None:
    check(kind(model), CASES[name])


@st.composite
def sessions(draw: st.DrawFn) -> tuple[int, list[Step]]:
    """The rows and steps of one session."""
    first = rows = draw(st.integers(1, 3))
    width = draw(st.integers(1, 6))
    steps = [Step(width, draw(st.integers(0, width - 1)))]
    for _ in range(draw(st.integers(0, 6))):
        order = None
        if draw(st.integers(0, 3)) == 0:
            order = tuple(draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
            rows = len(order)
        width = draw(st.sampled_from((1, 1, 1, 3)))
        keep, crop = draw(st.integers(1, width)), draw(st.sampled_from((0, 0, 2)))
        steps.append(Step(width, 0, keep, order, crop))
    return first, steps


@settings(max_examples=max(10, settings().max_examples // 2))
@given(st.lists(st.lists(sessions(), max_size=2), min_size=2, max_size=3), st.data())
def test_whatever_ranks_do_they_do_not_disturb_each_other(work: Any, data: Any) -> None:
    check(kind(data.draw(st.sampled_from(KINDS))), work)


def test_rows_that_end_together_are_read_without_a_table() -> None:
    one = kind("llama")
    pitches: list[int] = []

    def on(rank: Rank) -> None:
        runner = one.runner(one.cut[2][rank.rank], rank)
        plain = runner.run

        def run(stage: str, *inputs: Any) -> Any:
            pitches.append(inputs[4] if stage == "decode" else 1)
            return plain(stage, *inputs)

        runner.run = run  # type: ignore[method-assign]
        joint = JointRunner(runner, rank, rank.rank, timer)
        steps = prompt(4 + 2 * rank.rank, 5 + rank.rank)
        with torch.no_grad():
            play(joint.session(batch=2, capacity=20), 2, steps, 0)
            rank.finish(joint.serve)

    on_ranks(2, on)
    assert len(pitches) == 2 * (2 + 6)
    assert all(pitches)


def test_stale_memory_before_a_row_does_no_harm() -> None:
    one = kind("llama")

    def on(rank: Rank) -> Any:
        runner = one.runner(one.cut[2][rank.rank], rank)
        runner.workspace.reserve(4, 16)
        for memory in (*runner.workspace.keys, *runner.workspace.values):
            memory.fill_(float("nan"))
        joint = JointRunner(runner, rank, rank.rank, timer)
        with torch.no_grad():
            found = play(joint.session(batch=2, capacity=4), 2, prompt(3 + 2 * rank.rank, 3), 0)
            rank.finish(joint.serve)
        return found

    assert all(bool(t.isfinite().all()) for found in on_ranks(2, on) for t in found)


def test_what_ranks_together_do_not_serve_is_refused() -> None:
    one = kind("llama")
    joint = JointRunner(one.runner(one.whole, None), Rank(None, 0), 0, timer)  # type: ignore[arg-type]
    assert joint.takes_embeds is False
    assert joint.holds_keys is False
    session = joint.session(batch=1, capacity=4)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(InputError, match="no embeddings"):
        session.forward(ids, ids, embeds=torch.zeros(1, 2, 32))
    with pytest.raises(InputError, match="no keys"):
        session.load([], ids.bool())
    with pytest.raises(InputError, match="no keys"):
        session.read(0)
    with pytest.raises(EngineBusyError, match="another generate"):
        joint.session(batch=1, capacity=4)
    session.close()
    joint.plan_runner.release()
    with pytest.raises(EngineClosedError, match="nothing is prepared"):
        joint.session(batch=1, capacity=4)


@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
def test_a_turn_arrives_as_it_was_sent(
    batch: int, tokens: int, padded: bool, moved: bool, opens: bool
) -> None:
    ids = torch.arange(batch * tokens).view(batch, tokens)
    turn = Turn(
        ids=ids,
        positions=ids + 7,
        valid=ids % 2 == 0 if padded else None,
        keep=tokens,
        length=5,
        capacity=11,
        rows=torch.arange(batch) if moved else None,
        opens=opens,
    )
    packed = turn.packed()
    assert packed.numel() == count_of(turn.words)
    got = Turn.unpacked(turn.words, packed)
    for name in ("ids", "positions", "valid", "rows"):
        mine, theirs = getattr(turn, name), getattr(got, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
    assert (got.keep, got.length, got.capacity, got.opens) == (tokens, 5, 11, opens)
    assert count_of(None) == 0
