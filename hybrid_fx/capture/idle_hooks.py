"""Hooks that do nothing to what a forward computes, away for the time of one capture.

Dynamo cannot trace them. Without gradients these are backward hooks of a module, and those that ask
for the gradients of its output, of which transformers and PEFT put one on the input embeddings
(``enable_input_require_grads()``); and always ours, which count. The key of a plan leaves the same
ones out. Tried on torch 2.11 and 2.13, transformers 5.17 and
5.23, PEFT 0.21.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from ..ours import is_ours

_NAMES = ("make_inputs_require_grads", "make_inputs_require_grad")


@contextlib.contextmanager
def without_idle_hooks(model: nn.Module, *, training: bool) -> Iterator[None]:
    """These hooks are away inside the ``with`` block, and in their places after it.

    Args:
        training: Whether gradients are traced too: then backward hooks stay where they are.
    """
    before = [
        (hooks, hooks.copy(), keeps)
        for module in model.modules()
        for hooks, keeps in (
            (module._forward_hooks, _takes_part),
            (module._forward_pre_hooks, _takes_part),
            (module._backward_hooks, lambda _: training),
            (module._backward_pre_hooks, lambda _: training),
        )
        if hooks
    ]
    try:
        for hooks, all_of_them, keeps in before:
            for key, hook in all_of_them.items():
                if not keeps(hook):
                    del hooks[key]
        yield
    finally:
        for hooks, all_of_them, _ in before:
            hooks.clear()
            hooks.update(all_of_them)


def _takes_part(hook: Callable[..., object]) -> bool:
    return getattr(hook, "__name__", "") not in _NAMES and not is_ours(hook)
