"""The weight version: a counter that rises whenever a model's weights may have changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..cache.tree import View
from .checksum import checksums
from .snapshot import (
    Snapshot,
    first_change,
    is_readable,
    is_tensor_of,
    leaves,
    look,
    storage_address,
    tensors_of,
    uncounted,
)


class WeightTracker:
    """Counts the versions of one model's weights.

    What raises the version:

    - :meth:`mark`, at once;
    - a step of any ``torch.optim.Optimizer`` (foreach, fused, compiled, LBFGS and custom ones)
      that holds a parameter of the model, or a tensor in the memory of one, at once;
    - :meth:`refresh`, when for any parameter, buffer or tensor attribute the object, storage,
      offset, shape, stride, dtype, device or ``_version`` changed, when one appeared or went, or
      when a module's adapter state changed (active, disabled, merged, scaling, names). So
      ``load_state_dict``, ``.to()``, ties, resized embeddings and in-place edits need no hook,
      and none is put on the model: copies and pickles of it are those of the plain model.

    What it does not see with ``verify="off"``: memory written through ``.data`` or numpy while
    tensor and storage stay the same, unless an optimizer step does it; a parameter that takes the
    memory, version count and address of one that was freed before; tensors kept in lists or other
    objects. ``verify="checksum"`` finds the first two wherever values changed, at about 60 ms per
    GB for each refresh (see :mod:`.checksum`). Tensors made in inference mode count no versions,
    so their checksum is taken in either mode.

    Changes found by a refresh belong to a rise that nobody was told of yet, if there is one: a
    plain optimizer step raises the version once, though its edits show in ``_version`` as well.

    Attributes:
        reason: Why the version last rose; "" before the first time.
        on_step: Called after each optimizer step on the model.
    """

    reason: str
    on_step: Callable[[], None] | None

    def __init__(
        self,
        model: nn.Module,
        *,
        verify: Literal["off", "checksum"] = "off",
        view: View | None = None,
    ) -> None:
        if verify not in ("off", "checksum"):
            raise ValueError(f"verify={verify!r} is not known; use 'off' or 'checksum'")
        self.reason = ""
        self.on_step = None
        self._model = model
        self._view = view or View()
        self._verify = verify
        self._version = 0
        self._told = True
        self._seen = self._look(None)
        handle = register_optimizer_step_post_hook(_step_hook(weakref.ref(self)))
        # Runs on close(), or when the tracker is dropped without it.
        self._unhook = weakref.finalize(self, handle.remove)
        self._unhook.atexit = False

    @property
    def version(self) -> int:
        """The version as of the last refresh or mark. Starts at 0."""
        self._told = True
        return self._version

    @property
    def raised(self) -> int:
        """How often the version rose; asking tells nobody of it."""
        return self._version

    def mark(self, reason: str) -> None:
        """Raise the version by hand."""
        self._version += 1
        self._told = False
        self.reason = reason

    def refresh(self) -> int:
        """Look at the model now, raise the version if anything changed, and return it."""
        now = self._look(self._seen)
        change = first_change(self._seen, now)
        self._seen = now
        if change is not None and self._told:
            self.mark(change)
        return self.version

    def follow(self) -> None:
        """Take the model's memory as seen: it was put elsewhere, and no value changed."""
        self._seen = self._look(self._seen)

    def close(self) -> None:
        """Remove the optimizer hook. The tracker may still be refreshed and marked."""
        self._unhook()

    def _look(self, before: Snapshot | None) -> Snapshot:
        now, tensors = look(self._model, before, self._view)
        to_read = tensors if self._verify == "checksum" else uncounted(now, tensors)
        to_read = {name: tensor for name, tensor in to_read.items() if is_readable(tensor)}
        if to_read:
            now.sums = dict(zip(to_read, checksums(to_read.values()), strict=True))
        return now

    def _after_step(self, optimizer: Optimizer) -> None:
        updated = [t for outer in tensors_of(optimizer) for _, t in leaves("", outer)]
        storages = {address for t in updated if (address := storage_address(t)) is not None}
        if is_tensor_of(self._model, {id(t) for t in updated}, storages, self._view):
            self.mark(f"{type(optimizer).__name__}.step()")
            if self.on_step is not None:
                self.on_step()


def _step_hook(tracker: weakref.ref[WeightTracker]) -> Callable[..., None]:
    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (alive := tracker()) is not None:
            alive._after_step(optimizer)

    return after_step
