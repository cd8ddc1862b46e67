"""One model that trains and, on the same weights, generates from rewritten graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import HybridConfig
from .errors import (
    CaptureError,
    ConfigError,
    EngineBusyError,
    EngineClosedError,
    HybridError,
    InputError,
    StrictError,
)

if TYPE_CHECKING:
    from .distributed.initialize import initialize
    from .engine.engine import HybridEngine
    from .front import hybridize

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "ConfigError",
    "EngineBusyError",
    "EngineClosedError",
    "HybridConfig",
    "HybridEngine",
    "HybridError",
    "InputError",
    "StrictError",
    "__version__",
    "hybridize",
    "initialize",
]


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for: transformers takes seconds to load."""
    if name == "hybridize":
        from .front import hybridize

        return hybridize
    if name == "initialize":
        from .distributed.initialize import initialize

        return initialize
    if name == "HybridEngine":
        from .engine.engine import HybridEngine

        return HybridEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
