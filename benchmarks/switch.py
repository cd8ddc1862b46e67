"""switch: from ``eval()`` to the first generated token, less the prefill, after training.

Each turn is an optimizer step on a tiny batch, the timed call of one new token behind a short
prompt, and the same call again on the same weights: what the first took longer is the switch.
``unchanged`` is a ``train()`` and an ``eval()`` without a step in between.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import limits
import peft
import torch
from decode import prompts
from measure import Timer, spread
from record import Column, Result, Row, cell, spread_of
from shapes import build

import hybrid_fx

REPEAT = 5
_PROMPT = 8  # a long prefill would hide a short switch
COLUMNS: tuple[Column, ...] = (
    ("switch", cell("what")),
    ("ms", cell("ms", ".1f")),
    ("spread", spread_of("ms", ".1f")),
    ("prepare, ms", cell("prepare_ms", ".1f")),
    ("prefill, ms", cell("prefill_ms", ".1f")),
    ("weights read once, ms", cell("read_ms", ".1f")),
)


def adapted(model: Any) -> Any:
    """``model`` with LoRA of rank 16 on its linear layers, as it stands after some training.

    ``B`` is random: a delta of zeros, or one that bfloat16 would round away, is not folded.
    """
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def step_of(engine: Any, ids: torch.Tensor) -> Callable[[], None]:
    """One optimizer step on ``ids``."""
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        engine.train()
        engine(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Switch:
    """Times the switches of one engine to one new token behind ``ids`` [1, T]."""

    def __init__(self, engine: Any, ids: torch.Tensor, timer: Timer) -> None:
        self._engine, self._ids, self._timer = engine, ids, timer
        self._mask = torch.ones_like(ids)

    def _first_token(self) -> None:
        self._engine.generate(
            input_ids=self._ids, attention_mask=self._mask, max_new_tokens=1, do_sample=False
        )

    def _to_eval(self) -> None:
        self._engine.eval()
        self._first_token()

    def turn(self, before: Callable[[], object]) -> tuple[float, float, float]:
        """Seconds of the switch after ``before``, of its prepare, and of a prefill."""
        before()
        prepare = self._engine.stats.seconds.get("prepare", 0.0)
        whole = self._timer(self._to_eval)
        prepare = self._engine.stats.seconds.get("prepare", 0.0) - prepare
        prefill = statistics.median(self._timer(self._first_token) for _ in range(3))
        return whole - prefill, prepare, prefill


def _row(what: str, turns: list[tuple[float, float, float]], read: float) -> Row:
    switches, prepares, prefills = zip(*turns, strict=True)
    return {
        "what": what,
        **spread(switches),
        "prepare_ms": 1000 * statistics.median(prepares),
        "prefill_ms": 1000 * statistics.median(prefills),
        "read_ms": 1000 * read,
    }


def measured(name: str, model: Any, args: argparse.Namespace) -> list[Row]:
    """Rows of one model: its first switch, later ones, and those where nothing changed."""
    timer = Timer(args.device, args.clock)
    seconds = limits.read_seconds(args.device, timer)
    seconds()
    a_byte = statistics.median(seconds() for _ in range(args.repeat))
    read = a_byte * sum(p.nbytes for p in model.parameters())
    ids = prompts(model, 1, _PROMPT, args.device)
    options = {"disk_cache": False, **args.options}
    with hybrid_fx.hybridize(model, graph=args.graph, **options) as engine:
        step, switch = step_of(engine, ids), Switch(engine, ids, timer)
        turns = [switch.turn(step) for _ in range(args.repeat + 1)]
        same = [switch.turn(engine.train) for _ in range(args.repeat)]
    return [
        _row(f"{name}, the first, with capture", turns[:1], read),
        _row(f"{name}, later", turns[1:], read),
        _row(f"{name}, unchanged", same, read),
    ]


def run(args: argparse.Namespace) -> Result:
    """The model itself, and with LoRA."""
    rows: list[Row] = []
    for name in args.adapters:
        model: Any = build(args.shape, dtype=getattr(torch, args.dtype), device=args.device)
        rows += measured(name, adapted(model) if name == "LoRA" else model, args)
    return Result(rows=rows, columns=COLUMNS)
