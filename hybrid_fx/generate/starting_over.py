"""A call that starts over on another route finds all as it was: random numbers and streamer."""

from __future__ import annotations

from typing import Any

from ..compat.placement import device_of
from ..runtime.random_state import random_state, set_random_state
from .request import Request

#: What a draft is chosen by, before the first forward of the model that drafts are for.
_ASKED_BY_DRAFTS = ("logits_processor", "prefix_allowed_tokens_fn")


class Beginning:
    """The state of things before a loop of transformers, until it has run a first forward.

    Up to there it may have drawn (an assistant drafts first) and streamed the prompt. The random
    state is put back; what goes to a streamer waits for the first forward. A processor of the
    user's that chose drafts has seen them: such a call does not start over.

    Attributes:
        final: Whether the call can no longer start over.
    """

    def __init__(self, request: Request) -> None:
        device = device_of(request.causal)
        self._device = device
        self._state = random_state(device)
        drafts = request.mode == "assisted_generation"
        self.final = drafts and any(request.arguments.get(name) for name in _ASKED_BY_DRAFTS)
        self._streamer: _HeldBack | None = None
        if (streamer := request.arguments.get("streamer")) is not None:
            self._streamer = request.arguments["streamer"] = _HeldBack(streamer)

    def served(self) -> None:
        """A forward ran: the call goes on as it began."""
        self.final = True
        if self._streamer is not None:
            self._streamer.release()

    def restore(self) -> None:
        """Put back what was drawn."""
        set_random_state(self._device, self._state)


class _HeldBack:
    """A streamer that gets nothing before :meth:`release`, and all in order from there on."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._waiting: list[Any] | None = []

    def release(self) -> None:
        waiting, self._waiting = self._waiting or (), None
        for value in waiting:
            self._streamer.put(value)

    def put(self, value: Any) -> None:
        if self._waiting is None:
            self._streamer.put(value)
        else:
            self._waiting.append(value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)
