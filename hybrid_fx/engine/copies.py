"""Which prepared tensors have memory of their own beside the weights, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..plan.records import Prepared
from ..runtime import PlanRunner
from ..runtime.forms import name_of
from .iteration import readable_bytes

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class PreparedCopy:
    """One prepared tensor that is not the weights' own memory.

    Attributes:
        name: As the manifest has it: the module path and the operator.
        nbytes: Of its memory.
        reason: Why it is not a weight or a stack in which weights lie.
    """

    name: str
    nbytes: int
    reason: str


def prepared_copies(
    runner: PlanRunner, *, asked: bool, refused: Mapping[tuple[str, ...], str] | None
) -> tuple[PreparedCopy, ...]:
    """What a runner holds beside the weights, in the order of its manifest.

    Args:
        runner: Whose prepared tensors.
        asked: Whether stacks were to share the weights' memory.
        refused: What is stacked to why it could not; ``None`` where the memory is not ours to
            lay out.
    """

    def reason(tensor: Prepared, packed: torch.dtype | None) -> str:
        if packed == getattr(torch, tensor.dtype):
            return "packed for the kernels of the device"
        if packed is not None:
            return (
                f"packed in {name_of(packed)}, {packed.itemsize} bytes a weight, for the kernels "
                f'of the device; pack_dtype="same" keeps {tensor.dtype}'
            )
        if tensor.folded:
            return "adapters are folded into it"
        operator, made, _ = tensor.recipe.partition("(")
        if not made:
            return "it is gathered from all ranks"
        if not tensor.stacked:
            return f"{operator} makes it"
        if not asked:
            return "share_storage=False"
        if refused is None:
            return "weights are sharded, or computed by several ranks"
        return refused.get(tensor.stacked, "it is not made of parameters as they are")

    return tuple(
        PreparedCopy(tensor.name, nbytes, reason(tensor, packed))
        for tensor, nbytes, packed in runner.prepared.copies
    )


def copy_lines(copies: Sequence[PreparedCopy]) -> Iterator[str]:
    """One line for each reason; reasons that name another layer only are one."""
    alike: dict[str, list[PreparedCopy]] = {}
    for copy in copies:
        alike.setdefault(_LAYER.sub(".#.", copy.reason), []).append(copy)
    for group in alike.values():
        size = readable_bytes(sum(copy.nbytes for copy in group))
        names = ", ".join(_names([copy.name for copy in group]))
        yield f"Copied beside the weights, {size} ({group[0].reason}): {names}"


def _names(names: Sequence[str]) -> Iterator[str]:
    """``layers.0-3.mlp`` for the names of four layers in a row."""
    numbers: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.search(name)
        numbers.setdefault(_LAYER.sub(".#.", name, count=1), []).append(found[1] if found else "")
    for template, layers in numbers.items():
        row = [*map(str, range(int(layers[0] or 0), int(layers[-1] or 0) + 1))]
        span = f"{row[0]}-{row[-1]}" if layers == row and len(row) > 1 else ",".join(layers)
        yield template.replace("#", span)
