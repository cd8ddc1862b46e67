"""What generation asks of a runtime: rows that grow column by column, and logits for the last.

Structural types: whatever has these members can be generated from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Session(Protocol):
    """The rows of one generate call. All rows hold the same number of columns."""

    @property
    def batch(self) -> int:
        """B, the rows held now."""

    @property
    def length(self) -> int:
        """S, the columns filled so far, invalid (padding) ones included."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        key_valid: Tensor | None = None,
        *,
        keep: int = 1,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Append T columns and return the logits of the last ``keep``.

        Args:
            input_ids: int64 ``[B, T]``.
            position_ids: int64 ``[B, T]``.
            key_valid: bool ``[B, T]``, False where nobody may look; ``None`` is all True.
            keep: How many trailing columns to return logits for, 1 to T.
            embeds: ``[B, T, E]``, what to compute from in place of the ids.

        Returns:
            ``[B, keep, V]`` in the dtype of the model's logits.
        """

    def load(self, prefix: Sequence[tuple[Tensor, Tensor]], key_valid: Tensor) -> None:
        """Append P columns whose keys and values are known.

        Args:
            prefix: One pair ``[B, K, P, D]`` a layer; a windowed layer may give its last columns
                alone.
            key_valid: bool ``[B, P]``, False where nobody may look.

        Raises:
            ValueError: where the pairs are not of the session's rows, layers, sizes and dtype.
        """

    def read(self, start: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Keys and values ``[B, K, S - start, D]`` of the columns from ``start`` on, copies."""

    def reorder(self, rows: Tensor) -> None:
        """Continue with new rows: row ``i`` is old row ``rows[i]`` (int64 ``[B']``).

        Rows that lie on the host are better: nobody has to ask a device which of them move.
        """

    def crop(self, length: int) -> None:
        """Forget the columns from ``length`` on."""

    def close(self) -> None:
        """Give the columns back."""


class Runner(Protocol):
    """Makes sessions on one prepared plan.

    Attributes:
        takes_embeds: Whether its sessions take ``embeds``; None where that was not proven yet.
        holds_keys: Whether its sessions can ``load`` and ``read``.
        rows_apart: Whether a row may be computed beside other rows than those of its call.
    """

    takes_embeds: bool | None

    @property
    def holds_keys(self) -> bool:
        """See above."""

    @property
    def rows_apart(self) -> bool:
        """See above."""

    def session(self, *, batch: int, capacity: int) -> Session:
        """A new session of ``batch`` empty rows, ``capacity`` columns reserved (it may grow)."""
