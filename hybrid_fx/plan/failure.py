"""Why a model structure has no plan: what a second process must know not to try again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .plain import JSON, need_text, odd, plain, record_fields

MOST = 2000
"""Characters of a reason that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The end of a capture that failed, and would fail again.

    Attributes:
        reason: for a person.
        guards: what the capture assumed and the cache key does not hold, name to value.

    Raises:
        CacheError: for a field of another type, a value JSON cannot hold.
    """

    reason: str
    guards: Mapping[str, JSON]

    def __post_init__(self) -> None:
        need_text(self, "reason")
        object.__setattr__(self, "reason", self.reason[:MOST])
        if not isinstance(self.guards, Mapping):
            odd(self, "guards", "a mapping of names to JSON values")
        object.__setattr__(self, "guards", plain(dict(self.guards), "Failure.guards"))

    def to_json(self) -> dict[str, JSON]:
        """Return plain JSON values; :meth:`from_json` gives an equal failure back."""
        return {"reason": self.reason, "guards": dict(self.guards)}

    @classmethod
    def from_json(cls, value: object) -> Failure:
        """Read what :meth:`to_json` wrote.

        Raises:
            CacheError: for a missing or unknown field, or a value of another type.
        """
        return cls(**record_fields(cls, value))
