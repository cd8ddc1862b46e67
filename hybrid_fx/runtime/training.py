"""Run a training plan on the live weights of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..passes.operators import OPERATORS
from ..passes.thread_masks import MASKS
from ..plan.plan import Plan, load_functions
from .configured import WITHOUT_POSITIONS, Configured, build_masks, layer_checkpoint


def by_checkpoint(
    function: Callable[..., Any], checkpoint: Callable[..., Any]
) -> Callable[..., Any]:
    """``function`` under ``checkpoint``: what it computes is computed again in the backward pass.

    As in the model, the tensors that flow through are the checkpoint's arguments, and the
    parameters are not.
    """

    def checkpointed(*arguments: Any) -> Any:
        flowing = [
            i
            for i, value in enumerate(arguments)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        ]
        fixed = [None if i in flowing else value for i, value in enumerate(arguments)]

        def run(*tensors: Any) -> Any:
            filled = list(fixed)
            for i, tensor in zip(flowing, tensors, strict=True):
                filled[i] = tensor
            return function(*filled)

        return checkpoint(run, *(arguments[i] for i in flowing))

    return checkpointed


class TrainingRunner:
    """The functions of a training plan, bound to one model as it stands.

    Args:
        plan: What to run; its source is checked before it is executed.
        model: Whose parameters are read anew in each call.
        dtype: Of the model's embeddings.

    Raises:
        CaptureError: where the model's attention or checkpointing cannot be called as it is
            configured.

    Attributes:
        packing: Whether positions [B, T] that start anew begin another sequence, where the call
            has no mask and no cache. Not all models look for that.
        checkpointed: Whether the decoder layers run under gradient checkpointing.
    """

    def __init__(self, plan: Plan, model: nn.Module, *, dtype: torch.dtype) -> None:
        self.plan = plan
        self.packing = True
        self._dtype = dtype
        attentions = plan.manifest.kv
        if not attentions:
            raise CaptureError("no attention was found that goes through transformers' registry")
        modules = [model.get_submodule(a.path) for a in attentions]
        self._cached = [Configured(module, cached=True) for module in modules]
        self._uncached = [Configured(module, cached=False) for module in modules]
        self._config = self._uncached[0].config
        if any(one.config is not self._config for one in self._uncached):
            raise CaptureError("its attentions have different configs; their masks may differ")
        self._kinds = frozenset(MASKS[a.window is not None] for a in attentions)
        windows = {a.window for a in attentions if a.window is not None}
        if windows - {getattr(self._config, "sliding_window", None)}:
            raise CaptureError(f"its attentions have windows {sorted(windows)}, not the config's")
        self._holders = [_holder(model, weight.name) for weight in plan.manifest.weights]
        functions = load_functions(plan.sources["train"], OPERATORS, name="train")
        self._train = functions["train"]
        rows: tuple[Any, ...] = plan.manifest.layers
        checkpoint = layer_checkpoint(
            model, [row["path"] for row in rows], whole=all(row["whole"] for row in rows)
        )
        self.checkpointed = checkpoint is not None
        if checkpoint is not None:
            self._plain = load_functions(plan.sources["train"], OPERATORS, name="train")["train"]
            for name, function in functions.items():
                if name != "train":
                    function.__globals__[name] = by_checkpoint(function, checkpoint)
        else:
            self._plain = self._train

    @property
    def reads_positions(self) -> bool:
        """Whether an attention implementation may look at positions itself."""
        return any(one.name not in WITHOUT_POSITIONS for one in self._uncached)

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        keep: int | Tensor = 0,
        cached: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits [B, T or as many as kept, V] of input_ids [B, T], under autograd.

        Args:
            attention_mask, position_ids: [B, T], or ``None`` as in the call that was captured.
            keep: ``logits_to_keep`` of transformers.
            cached: Whether the module would put keys and values into a cache; it does not where
                layers are checkpointed.
            weights: By qualified name, in place of the model's own; then nothing is checkpointed.
        """
        cached = cached and not self.checkpointed
        masks = build_masks(
            self._config,
            self._kinds,
            input_ids,
            attention_mask,
            position_ids if self.packing and not cached else None,
            self._dtype,
        )
        run = self._train if weights is None else self._plain
        out: Tensor = run(
            input_ids,
            attention_mask,
            position_ids,
            *masks,
            keep,
            self._cached if cached else self._uncached,
            self._weights(weights),
        )
        return out

    def _weights(self, given: Mapping[str, Tensor] | None) -> Sequence[Tensor | None]:
        if given is not None:
            return [given[weight.name] for weight in self.plan.manifest.weights]
        return [tensors[name] for tensors, name in self._holders]


def _holder(model: nn.Module, name: str) -> tuple[Mapping[str, Tensor | None], str]:
    """Where a module keeps the tensor ``name``: it may be another one at the next call."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        return module._parameters, leaf
    if leaf in module._buffers:
        return module._buffers, leaf
    raise CaptureError(f"the model has no parameter or buffer {name}")
