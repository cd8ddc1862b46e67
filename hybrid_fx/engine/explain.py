"""What became of a model: per layer what was fused, what was not and why; memory; sources.

The report is plain frozen data first; :meth:`Explanation.render` draws it for a terminal.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ..passes.outcome import LayerReport
from .copies import PreparedCopy, copy_lines
from .iteration import readable_bytes
from .pass_table import PassReport, pass_table

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class LoraDecision:
    """How one adapted module runs.

    Attributes:
        path: Module path of the adapted layer.
        choice: ``fold``, ``side``, or ``unfolded`` for adapters that cannot be folded.
        reason: Why, e.g. ``lora="auto"`` or the adapter's kind.
        error: Relative error of the adapter's output if folded; None where not measured.
    """

    path: str
    choice: str
    reason: str
    error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The report of :meth:`HybridEngine.explain`. ``print()`` shows it; sizes are in bytes.

    Attributes:
        layers: One report per decoder layer, in order.
        matched: Layers that are rewritten in full.
        total: All decoder layers.
        weight_bytes: Memory of the parameters and buffers, which training owns.
        prepared_bytes: Memory of the prepared tensors, which the plan owns.
        prepare_peak_bytes: Most memory that preparing needs beyond what stood before it.
        kv_bytes: Memory of the KV workspace.
        recorded_bytes: Memory that recorded decode steps hold, beside that of what they read.
        shared_bytes: Of the weights, what the graphs read as stacks that need no copy, see
            ``share_storage``.
        copies: The prepared tensors that have memory of their own, and why.
        lora: A decision for each adapted module; empty without adapters.
        fallbacks: Reason to how often a call left the rewritten graphs.
        sources: ``prepare``, ``prefill`` and ``decode`` to their generated Python source; and
            ``train``, where a training graph has served.
        notes: Whatever else a user should know, one sentence each.
        passes: What each pass did; empty unless ``explain(passes=True)`` asked for it.
    """

    layers: tuple[LayerReport, ...]
    matched: int
    total: int
    weight_bytes: int = 0
    prepared_bytes: int = 0
    prepare_peak_bytes: int = 0
    kv_bytes: int = 0
    recorded_bytes: int = 0
    shared_bytes: int = 0
    copies: tuple[PreparedCopy, ...] = ()
    lora: tuple[LoraDecision, ...] = ()
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    passes: tuple[PassReport, ...] = ()

    @property
    def eval_bytes(self) -> int:
        """What generating holds beyond the weights, from one call to the next."""
        return self.prepared_bytes + self.kv_bytes + self.recorded_bytes

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data that JSON can hold."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}

    def render(self, console: Console | None = None, *, sources: bool = False) -> None:
        """Print the report; runs of layers with the same outcome share a row.

        Args:
            console: Where to; None is a new rich console on the standard output.
            sources: Also print the generated sources.
        """
        from rich.console import Console

        out = console if console is not None else Console()
        for part in self._parts(sources=sources):
            out.print(part, markup=False, highlight=False)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        plain = Console(
            file=text, width=_WIDTH, color_system=None, force_terminal=False, force_jupyter=False
        )
        self.render(plain)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _parts(self, *, sources: bool) -> Iterator[RenderableType]:
        yield f"{self.matched} of {self.total} layers rewritten"
        if self.layers:
            yield self._layer_table()
        if self.passes:
            yield pass_table(self.passes)
        yield self._memory_table()
        yield from copy_lines(self.copies)
        yield from self._lora_lines()
        if self.fallbacks:
            yield "Calls that left the rewritten graphs:"
            yield from (f"  {times} x {reason}" for reason, times in self.fallbacks.items())
        yield from (f"Note: {note}" for note in self.notes)
        if sources:
            from rich.syntax import Syntax

            for name, source in self.sources.items():
                yield f"\n# ---- {name} ----"
                yield Syntax(source, "python", word_wrap=True, background_color="default")

    def _layer_table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=any(layer.missed for layer in self.layers), expand=False)
        for title, style in (("layer", "cyan"), ("policy", ""), ("fused", "green")):
            table.add_column(title, style=style, overflow="fold")
        table.add_column("not fused, and why", style="yellow", overflow="fold", ratio=1)
        for first, last in _runs(self.layers):
            table.add_row(
                Text(_span(first.path, last.path)),
                Text(first.policy or "none fits"),
                Text(", ".join(first.fused) or "nothing"),
                Text("\n".join(_missed_lines(first, last)) or "-"),
            )
        return table

    def _memory_table(self) -> Table:
        from rich.table import Table

        table = Table("memory", show_edge=False, box=None)
        table.add_column("", justify="right")
        for name, size in (
            ("weights", self.weight_bytes),
            ("of them in shared stacks", self.shared_bytes),
            ("prepared tensors", self.prepared_bytes),
            ("peak of prepare", self.prepare_peak_bytes),
            ("KV workspace", self.kv_bytes),
            *([("recorded decode steps", self.recorded_bytes)] if self.recorded_bytes else []),
            ("to generate, beyond the weights", self.eval_bytes),
        ):
            table.add_row(name, readable_bytes(size))
        return table

    def _lora_lines(self) -> Iterator[str]:
        groups = Counter((decision.choice, decision.reason) for decision in self.lora)
        for (choice, reason), times in groups.items():
            errors = [
                decision.error
                for decision in self.lora
                if (decision.choice, decision.reason) == (choice, reason)
                and decision.error is not None
            ]
            worst = f"; largest relative error {max(errors):.2%}" if errors else ""
            yield f"LoRA {choice}: {times} modules ({reason}{worst})"


def _plain(value: Any) -> Any:
    """``value`` with dicts, lists and scalars only."""
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _runs(layers: tuple[LayerReport, ...]) -> Iterator[tuple[LayerReport, LayerReport]]:
    """First and last of each run of consecutive layers with the same outcome."""
    start = 0
    for end in range(1, len(layers) + 1):
        if end == len(layers) or not _continues(layers[end - 1], layers[end]):
            yield layers[start], layers[end - 1]
            start = end


def _continues(one: LayerReport, other: LayerReport) -> bool:
    """Whether ``other`` is the next layer of the same stack, with the same outcome."""
    stem, index = _split(one.path)
    if index is None or _split(other.path) != (stem, index + 1):
        return False
    return _outcome(one) == _outcome(other)


def _outcome(layer: LayerReport) -> tuple[object, ...]:
    """What two layers must share to stand in one row: all but path and node names."""
    reasons = [(missed.what, missed.expected, missed.found) for missed in layer.missed]
    return layer.policy, layer.fused, reasons


def _split(path: str) -> tuple[str, int | None]:
    """``model.layers.7`` is ``("model.layers", 7)``; a path without a last number has None."""
    stem, _, last = path.rpartition(".")
    return (stem, int(last)) if last.isdecimal() else (path, None)


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first}-{_split(last)[1]}"


def _missed_lines(first: LayerReport, last: LayerReport) -> Iterator[str]:
    for one, other in zip(first.missed, last.missed, strict=True):
        node = one.node if one.node == other.node else f"{one.node} … {other.node}"
        yield f"{one.what} at {node}: expected {one.expected}, found {one.found}"
