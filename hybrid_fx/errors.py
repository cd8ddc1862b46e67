"""The errors hybrid_fx raises. Each message names the value, the limit and the remedy."""


class HybridError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(HybridError, ValueError):
    """A configuration key is unknown, or its value is outside the allowed set."""


class CaptureError(HybridError, RuntimeError):
    """The model's forward could not be captured as one graph.

    Raised within traced code too, so it is made of a message alone.

    Attributes:
        lasting: Whether tracing the same structure again would come to the same end.
    """

    lasting: bool = False


class CaptureTimeoutError(CaptureError):
    """Tracing the model's forward took longer than ``capture_timeout``."""


class CacheError(HybridError, RuntimeError):
    """A stored plan is damaged, foreign or unsafe; the caller captures again."""


class InputError(HybridError, ValueError):
    """Arguments of a call do not fit the model: ids, masks, lengths, module kinds."""


class EngineClosedError(HybridError, RuntimeError):
    """The engine was closed and serves no further calls."""


class EngineBusyError(HybridError, RuntimeError):
    """A generate was called inside another one of the same engine, which cannot serve both."""


class StrictError(HybridError, RuntimeError):
    """With ``strict=True``: some part of the model does not run from rewritten graphs."""


class RankError(HybridError):
    """Another rank of a collective generate raised an error, disagrees, or is gone."""
