"""iteration: one whole GRPO step, against the same loop with ``transformers.generate``.

A step is the rollout of the grpo workload (switch included), rewards, and the update: the
log-probabilities of the sampled tokens, the loss, its backward, and AdamW. Both sides learn in each
way of ``--learning``: by rows, or each prompt once with its samples behind it (``learning.py``), at
most ``--rows-at-once`` in a backward.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import forced
import torch
from forced import Work
from grpo import WAYS, roll_out
from learning import LEARNING, Learning
from measure import Timer, compared, in_turn
from record import Column, Result, Row, cell, spread_of
from shapes import build
from torch import Tensor

import hybrid_fx

REPEAT = 3  # a turn with transformers is minutes on a CPU
PARTS = ("rollout", "learn", "step")
COLUMNS: tuple[Column, ...] = (
    ("transformers / hybrid_fx", cell("what")),
    ("learning by", cell("learning")),
    ("transformers, s", cell("b_seconds", ".2f")),
    ("hybrid_fx, s", cell("a_seconds", ".2f")),
    ("ratio", cell("ratio", ".2f")),
    ("spread", spread_of("ratio", ".2f")),
)


def advantages(rewards: Tensor) -> Tensor:
    """Of rewards [prompts, samples]: how much above its group each is, in standard deviations."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


class Loop:
    """One side: a model, how it generates, and its optimizer.

    Attributes:
        seconds: Part of :data:`PARTS` to its seconds, one for each step so far.
    """

    def __init__(
        self,
        model: Any,
        options: Callable[[Work], dict[str, Any]],
        learning: Learning,
        args: argparse.Namespace,
    ) -> None:
        self._model, self._options, self._learning = model, options, learning
        self._shape = (args.prompts, args.samples)
        self._at_once, self._timer = args.rows_at_once, Timer(args.device, args.clock)
        self._optimizer = torch.optim.AdamW(list(model.parameters()), lr=1e-6)
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}

    def _roll_out(self, work: Work) -> Tensor:
        self._model.eval()
        return roll_out(self._model, work, self._options(work))

    def _learn(self, work: Work, out: Tensor) -> None:
        self._model.train()
        # Any reward does: the share of even tokens.
        even = (out[:, work.ids.shape[1] :] % 2 == 0).float().mean(1)
        gains = advantages(even.view(self._shape)).flatten()
        for part in self._learning(self._model, out, work, gains, self._at_once):
            part.backward()

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def __call__(self, work: Work) -> float:
        """One whole step; its seconds."""
        now = self._timer.now
        marks = [now()]
        out = self._roll_out(work)
        marks.append(now())
        self._learn(work, out)
        marks.append(now())
        self._step()
        marks.append(now())
        for name, (start, end) in zip(PARTS, itertools.pairwise(marks), strict=True):
            self.seconds[name].append(end - start)
        return marks[-1] - marks[0]


def run(args: argparse.Namespace) -> Result:
    """The loop over hybrid_fx (a) against the loop over transformers (b), and their parts."""
    torch.manual_seed(0)
    model: Any = build(args.shape, dtype=getattr(torch, args.dtype), device=args.device)
    plain = copy.deepcopy(model)
    work = forced.work(model, args)
    settings, options = WAYS[args.ways[-1]]
    more = {"disk_cache": False, **settings, **args.options}
    rows: list[Row] = []
    notes: list[str] = []
    with hybrid_fx.hybridize(model, graph=args.graph, **more) as engine:
        for name in args.learning:
            learning = LEARNING[name]
            ours = Loop(engine, options, learning, args)
            theirs = Loop(plain, Work.options, learning, args)
            ours(work)  # all of it: the first call makes plan, prepared tensors and workspace
            theirs(work.short())
            times = in_turn({"a": partial(ours, work), "b": partial(theirs, work)}, args.repeat)
            rows.append(compared("iteration", times["a"], times["b"], learning=name))
            for part in PARTS:
                a, b = (side.seconds[part][1:] for side in (ours, theirs))
                rows.append(compared(part, a, b, learning=name))
            share = rows[-len(PARTS)]["a_ms"] / statistics.median(times["a"]) / 1000
            notes.append(f"by {name}: rollout ({args.ways[-1]}) is {share:.0%} of our iteration")
    for row in rows:
        row |= {"a_seconds": row["a_ms"] / 1000, "b_seconds": row["b_ms"] / 1000}
    return Result(rows=rows, columns=COLUMNS, notes=notes)
