"""The seam to hooks that ask for the gradients of a module's output, for the time of one capture.

transformers and PEFT put one on the input embeddings (``enable_input_require_grads()``). Without
gradients it does nothing, and Dynamo of torch 2.11 cannot trace it. Tried on transformers 5.17
and 5.23, PEFT 0.21.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

_NAMES = ("make_inputs_require_grads", "make_inputs_require_grad")


@contextlib.contextmanager
def without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """These hooks are away inside the ``with`` block, and in their places after it."""
    before = [(hooks, hooks.copy()) for m in model.modules() if (hooks := m._forward_hooks)]
    try:
        for hooks, all_of_them in before:
            for key, hook in all_of_them.items():
                if getattr(hook, "__name__", "") in _NAMES:
                    del hooks[key]
        yield
    finally:
        for hooks, all_of_them in before:
            hooks.clear()
            hooks.update(all_of_them)
