"""The run from beginning to end."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import hybrid_fx

from .loop import GrpoSettings, Iteration, run_grpo
from .models import add_lora, end_ids, load_model, small_llama, takes_positions
from .options import DTYPES, build_parser, parse
from .ranks import DeepSpeedUpdate, Ranks, ds_config, place, start, started, this_rank
from .report import Outcome, draw_chart, iteration_line, outcome_table
from .rollout import Sampler, accuracy
from .speed import Speed, compare
from .task import Problems, few_shot_prefix, make_problems, write_out
from .warmup import warm_up

PROBE = 200


def main(argv: Sequence[str] | None = None) -> Outcome | None:
    """Run the example with the command line ``argv`` (without the program's name).

    With ``--zero`` it runs in processes of its own, and returns nothing, unless a launcher
    (``torchrun``, ``deepspeed``) started several already.

    Raises:
        SystemExit: with status 2 and one line on stderr where an option makes no sense.
    """
    options = parse(argv)
    if options.zero is not None and not started():
        start(options, begin)
        return None
    return begin(options)


def begin(options: argparse.Namespace) -> Outcome:
    """Make problems and model, and run: on one rank, or alone."""
    if options.zero is not None:
        place(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        probe = min(PROBE, options.held_out)
        problems = make_problems(
            digits=options.digits, held_out=options.held_out, probe=probe, seed=options.seed
        )
        if len(problems.train) < options.prompts:
            raise ValueError(
                f"--prompts {options.prompts}: only {len(problems.train)} are there to draw from"
            )
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        model, tokenizer = (
            small_llama(hidden=options.hidden, layers=options.layers)
            if options.model is None
            else load_model(options.model)
        )
        model = model.to(device=options.device, dtype=DTYPES[options.dtype])
    except (OSError, ValueError) as error:
        build_parser().error(" ".join(str(error).split()))
    return run(options, model, tokenizer, problems)


def run(options: argparse.Namespace, model: Any, tokenizer: Any, problems: Problems) -> Outcome:
    """Warm up, measure, run GRPO, measure again, compare the speed, draw and print."""
    began = time.perf_counter()
    ranks = this_rank(options)
    console = Console(highlight=False, quiet=ranks.rank > 0)
    held_out = ranks.share(problems.held_out)
    sampler = make_sampler(options, model, tokenizer)
    with progress_bars(console) as bars:
        # DeepSpeed gives the weights of rank 0 to all.
        warm_seconds = 0.0 if ranks.rank else warm(options, model, sampler, problems, bars)
        if options.lora:
            model = add_lora(model)
        engine = make_engine(options, model, ranks)
        torch.manual_seed(options.seed + ranks.rank)
        before = ranks.mean(accuracy(engine, sampler, held_out))
        console.print(f"held-out accuracy before GRPO: {before:.1%}")
        history = grpo(options, engine, sampler, problems, bars, ranks)
        after = ranks.mean(accuracy(engine, sampler, held_out))
        console.print(f"held-out accuracy after GRPO: {after:.1%}")
        speed = race(options, engine, sampler, problems, bars) if options.turns else None
    if options.explain and not ranks.rank:
        print(engine.explain())
    stats = engine.stats
    engine.close()
    seconds = time.perf_counter() - began
    outcome = Outcome(
        before,
        after,
        ranks.count * len(held_out),
        speed,
        dict(stats.fallbacks),
        tuple(history),
        warm_seconds,
        seconds,
    )
    name = options.model or f"Llama of {sum(p.numel() for p in model.parameters()):,} parameters"
    job = f"GRPO, {options.control} control" if options.control else "GRPO"
    if options.zero is not None:
        job += f" under ZeRO-{options.zero} on {ranks.count} processes"
        name = options.model or "a small Llama"
    title = f"{job}, {name}, seed {options.seed}"
    if ranks.rank:
        return outcome
    chart = options.out / "grpo.png"
    draw_chart(outcome, chart, title)
    console.print(outcome_table(outcome, title))
    console.print(f"chart: {chart}")
    return outcome


def make_engine(options: argparse.Namespace, model: Any, ranks: Ranks) -> Any:
    """Return the engine: of this process alone, or DeepSpeed's over all ranks."""
    if options.zero is None:
        return hybrid_fx.hybridize(model)
    return hybrid_fx.initialize(model=model, config=ds_config(options, ranks))[0]


def make_sampler(options: argparse.Namespace, model: Any, tokenizer: Any) -> Sampler:
    """Return the sampler; a pretrained model sees worked examples before each prompt."""
    largest = 10**options.digits - 1
    longest = len(write_out(largest, largest).solution) + 2  # one token a byte, at most
    return Sampler(
        tokenizer=tokenizer,
        device=torch.device(options.device),
        prefix="" if options.model is None else few_shot_prefix(),
        ends=end_ids(model, tokenizer, newline=options.model is not None),
        max_new_tokens=options.max_new_tokens or longest,
    )


def warm(
    options: argparse.Namespace, model: Any, sampler: Sampler, problems: Problems, bars: Progress
) -> float:
    """Run the warm-up on ``model`` in place and return its seconds; 0 steps are none."""
    if not options.warmup_steps:
        return 0.0
    start = time.perf_counter()
    bar = bars.add_task("warm-up", total=options.warmup_steps)

    def report(step: int, loss: float, reached: float | None) -> None:
        bars.update(bar, completed=step)
        if reached is not None:
            bars.console.print(f"warm-up {step:4d}  loss {loss:.3f}  probe accuracy {reached:.1%}")

    end = sampler.tokenizer.eos_token if options.model is None else "\n"
    warm_up(
        model,
        sampler.tokenizer,
        problems.train,
        steps=options.warmup_steps,
        batch=options.warmup_batch,
        lr=options.warmup_lr,
        target=options.warmup_target,
        accuracy=lambda: accuracy(model, sampler, problems.probe),
        check_every=20,
        prefix=sampler.prefix,
        end=end,
        seed=options.seed,
        report=report,
    )
    bars.remove_task(bar)
    return time.perf_counter() - start


def grpo(
    options: argparse.Namespace,
    engine: Any,
    sampler: Sampler,
    problems: Problems,
    bars: Progress,
    ranks: Ranks,
) -> list[Iteration]:
    """Run the loop behind a progress bar and one line an iteration."""
    bar = bars.add_task("GRPO", total=options.iterations)

    def report(row: Iteration) -> None:
        bars.console.print(iteration_line(row, options.iterations), soft_wrap=True)
        bars.advance(bar)

    settings = GrpoSettings(
        iterations=options.iterations,
        prompts=options.prompts // ranks.count,
        samples=options.samples,
        epochs=options.epochs,
        clip=options.clip,
        temperature=options.temperature,
        lr=options.lr,
        rows_at_once=options.rows_at_once,
        positions=takes_positions(engine.module),
        control=options.control,
        seed=options.seed + ranks.rank,
    )
    update = None if options.zero is None else DeepSpeedUpdate(engine)
    history = run_grpo(engine, sampler, problems.train, settings, report, update)
    bars.remove_task(bar)
    return history


def race(
    options: argparse.Namespace, engine: Any, sampler: Sampler, problems: Problems, bars: Progress
) -> Speed:
    """Compare rollout speeds on the prompts of one iteration."""
    bar = bars.add_task("speed", total=options.turns)
    speed = compare(
        engine,
        sampler,
        problems.held_out[: options.prompts],
        samples=options.samples,
        temperature=options.temperature,
        turns=options.turns,
        seed=options.seed,
        report=lambda turn: bars.update(bar, completed=turn),
    )
    bars.remove_task(bar)
    return speed


def progress_bars(console: Console) -> Progress:
    """Return live bars on ``console``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
