"""iteration: one whole GRPO step, against the same loop with ``transformers.generate``.

A step is the rollout of the grpo workload (switch included), rewards, and the update: the
log-probabilities of the sampled tokens, the loss, its backward, and AdamW. Rows learn in batches
of ``--rows-at-once``, sorted by length and cut to the longest; logits are those of new tokens.
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
from measure import Timer, compared, in_turn
from record import Column, Result, Row, cell, spread_of
from shapes import build
from torch import Tensor

import hybrid_fx

REPEAT = 3  # a turn with transformers is minutes on a CPU
PARTS = ("rollout", "learn", "step")
COLUMNS: tuple[Column, ...] = (
    ("transformers / hybrid_fx", cell("what")),
    ("transformers, s", cell("b_seconds", ".2f")),
    ("hybrid_fx, s", cell("a_seconds", ".2f")),
    ("ratio", cell("ratio", ".2f")),
    ("spread", spread_of("ratio", ".2f")),
)


def advantages(rewards: Tensor) -> Tensor:
    """Of rewards [prompts, samples]: how much above its group each is, in standard deviations."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def objective(model: Any, out: Tensor, work: Work, rows: list[int], gains: Tensor) -> Tensor:
    """Minus the gain of ``rows``, on policy: the gradient is that of the log-probabilities.

    Args:
        model: Called as a module; the engine, or the model itself.
        out: Tokens [B, T + longest].
        gains: Advantages [B].
    """
    prompt = work.ids.shape[1]
    lengths = torch.tensor([work.lengths[row] for row in rows], device=out.device)
    longest = int(lengths.max())
    ids = out[rows, : prompt + longest]
    mask = torch.ones_like(ids)
    inside = torch.arange(longest, device=out.device) < lengths[:, None]
    mask[:, prompt:] = inside
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=longest + 1).logits
    log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
    chosen = log_probs.gather(2, ids[:, prompt:, None])[..., 0]
    weight = torch.exp(chosen - chosen.detach()) * gains[rows, None]
    return -(weight * inside).sum() / work.tokens


class Loop:
    """One side: a model, how it generates, and its optimizer.

    Attributes:
        seconds: Part of :data:`PARTS` to its seconds, one for each step so far.
    """

    def __init__(
        self, model: Any, options: Callable[[Work], dict[str, Any]], args: argparse.Namespace
    ) -> None:
        self._model, self._options = model, options
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
        order = sorted(range(len(work.lengths)), key=work.lengths.__getitem__)
        for start in range(0, len(order), self._at_once):
            rows = order[start : start + self._at_once]
            objective(self._model, out, work, rows, gains).backward()

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
    with hybrid_fx.hybridize(model, graph=args.graph, **more) as engine:
        ours, theirs = Loop(engine, options, args), Loop(plain, Work.options, args)
        ours(work)  # all of it: the first call makes plan, prepared tensors and workspace
        theirs(work.short())
        times = in_turn({"a": partial(ours, work), "b": partial(theirs, work)}, args.repeat)
    rows: list[Row] = [compared("iteration", times["a"], times["b"])]
    for name in PARTS:
        a, b = (side.seconds[name][1:] for side in (ours, theirs))
        rows.append(compared(name, a, b))
    for row in rows:
        row |= {"a_seconds": row["a_ms"] / 1000, "b_seconds": row["b_ms"] / 1000}
    share = statistics.median(ours.seconds["rollout"][1:]) / statistics.median(times["a"])
    note = f"rollout of hybrid_fx: {args.ways[-1]}, {share:.0%} of its iteration"
    return Result(rows=rows, columns=COLUMNS, notes=(note,))
