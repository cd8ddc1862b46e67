"""What a run leaves behind: one line an iteration, a table, and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .loop import PARTS, Iteration
from .speed import Speed


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one run.

    Attributes:
        before, after: Greedy accuracy on the held-out problems, as fractions.
        fallbacks: Why calls left the engine's rewritten graphs, and how often.
    """

    before: float
    after: float
    held_out: int
    speed: Speed | None
    fallbacks: Mapping[str, int]
    history: tuple[Iteration, ...]
    warmup_seconds: float
    seconds: float


def iteration_line(row: Iteration, iterations: int) -> str:
    """Return what is printed for one iteration."""
    split = " ".join(f"{name} {row.seconds[name]:.2f}" for name in PARTS if _is_told(row, name))
    return (
        f"{row.index:3d}/{iterations} reward {row.reward:.3f} | {split} | "
        f"{row.tokens / row.rollout:.0f} tok/s"
    )


def _is_told(row: Iteration, name: str) -> bool:
    return name != "gather" or row.seconds[name] > 0  # one process gathers nothing


def outcome_table(outcome: Outcome, title: str) -> Table:
    """Return the table printed at the end."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    gained = 100 * (outcome.after - outcome.before)
    table.add_row(f"held-out accuracy before ({outcome.held_out})", f"{outcome.before:.1%}")
    table.add_row("held-out accuracy after", f"{outcome.after:.1%} ({gained:+.1f} points)")
    if outcome.speed is not None:
        speed = outcome.speed
        table.add_section()
        table.add_row("rollouts, hybrid_fx", f"{speed.engine:.0f} tokens/s")
        table.add_row("rollouts, transformers.generate", f"{speed.transformers:.0f} tokens/s")
        table.add_row("ratio", f"{speed.engine / speed.transformers:.2f}x")
        table.add_row(f"same sampled tokens in {speed.turns} turns", str(speed.same_tokens).lower())
    for reason, times in outcome.fallbacks.items():
        table.add_row("left the rewritten graphs", f"{times} times: {reason}")
    table.add_section()
    table.add_row("warm-up", f"{outcome.warmup_seconds:.0f} s")
    for name in PARTS:
        spent = sum(row.seconds[name] for row in outcome.history)
        if name == "gather":
            rollouts = sum(row.rollout for row in outcome.history)
            if spent:
                share = f"{spent:.1f} s ({spent / rollouts:.1%} of the rollouts)"
                table.add_row(f"GRPO: {LABELS[name]}", share)
            continue
        table.add_row(f"GRPO: {LABELS[name]}", f"{spent:.1f} s")
    table.add_row("whole run", f"{outcome.seconds:.0f} s")
    return table


LABELS = {
    "gather": "gather weights",
    "prepare": "prepare weights",
    "prefill": "prefill",
    "decode": "decode",
    "generate": "rest of generate",
    "learn": "forward and backward",
    "step": "optimizer",
    "other": "tokenizing, judging",
}


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of the last ``width`` values (fewer at the start) at each place."""
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw_chart(outcome: Outcome, path: Path, title: str) -> None:
    """Write a PNG: the reward over the iterations, and under it where the time of each went."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row.index for row in outcome.history]
    earned = [row.reward for row in outcome.history]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(steps, earned, color="0.75", label="reward of the rollouts")
    top.plot(steps, running_mean(earned, 10), color="tab:blue", label="mean of 10 iterations")
    top.axhline(outcome.before, color="tab:red", ls=":", label="held-out accuracy before (greedy)")
    top.axhline(outcome.after, color="tab:green", ls="--", label="held-out accuracy after (greedy)")
    top.set(title=title, ylabel="reward", ylim=(0, 1))
    top.legend(loc="lower right", fontsize="small")
    parts = [[row.seconds[name] for row in outcome.history] for name in PARTS]
    bottom.stackplot(steps, *parts, labels=[LABELS[name] for name in PARTS], step="mid")
    bottom.set(xlabel="iteration", ylabel="seconds", ylim=(0, None))
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
