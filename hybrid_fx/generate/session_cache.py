"""A transformers ``Cache`` that is a session: HF's loops reorder and crop the KV workspace."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..compat.transformers import HeldCache, cache_argument, cache_of
from ..errors import InputError
from .hf_cache import extend, prefix_of
from .protocol import Session


class SessionCache(HeldCache):
    """What HF's loops hold as the KV cache while a session runs, and what is left after.

    It also keeps the token ids of the columns, so that a later call can be given this cache: the
    KV memory went back to the engine, but the prompt that continues these ids is all that
    ``generate`` needs.

    Attributes:
        session: The live session, or None before the first forward and after the call.
        ids: The tokens of the columns, int64 ``[B, S]``; -1 where those are unknown.
        origin: A caller's own cache: the session starts from its columns.
    """

    def __init__(self, layers: int, ids: Tensor | None = None, *, origin: Any = None) -> None:
        super().__init__(layers)
        self.session: Session | None = None
        self.ids = torch.empty(0, 0, dtype=torch.int64, device="cpu") if ids is None else ids
        self.origin = origin
        self._rows: Tensor | None = None  # of the origin, as they stand now
        self._given = 0
        if origin is not None and (prefix := prefix_of(origin)):
            self._given = origin.get_seq_length()
            keys = prefix[0][0]
            self.ids = torch.full((keys.shape[0], self._given), -1, device=keys.device)

    def open(self, session: Session, mask: Tensor | None) -> None:
        """Take a session and put the origin's columns into it; ``mask`` ``[B, S]`` covers them.

        Raises:
            ValueError: where they do not fit the rows, or the keys and values of the model.
        """
        self.session = session
        if self._given:
            columns = torch.ones_like(self.ids) if mask is None else mask[:, : self._given]
            session.load(prefix_of(self.origin), columns.bool())

    def give_back(self) -> None:
        """Let the origin hold what the session holds: its rows in order, and all new columns."""
        if self.origin is not None and self.session is not None:
            extend(self.origin, self._rows, self.session.read(self._given))

    def append(self, ids: Tensor) -> None:
        """Note the tokens ``[B, T]`` of the columns a forward just added."""
        self.ids = torch.cat([self.ids, ids], -1) if self.ids.numel() else ids

    def __repr__(self) -> str:
        return f"SessionCache(columns={self.get_seq_length()}, live={self.session is not None})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """S, the columns held."""
        return int(self.ids.shape[1])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns after ``query_length`` more, and the first of them."""
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.ids.shape[0])

    @property
    def is_initialized(self) -> bool:
        """Whether columns are held."""
        return self.get_seq_length() > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` continues old row ``beam_idx[i]``."""
        self._live().reorder(beam_idx.to(torch.int64))
        rows = beam_idx.to(self.ids.device)
        self.ids = self.ids[rows]
        self._rows = rows if self._rows is None else self._rows[rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        rows = torch.arange(self.batch_size, device=self.ids.device)
        self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        rows = torch.arange(self.batch_size, device=self.ids.device)
        self.reorder_cache(rows[indices.to(rows.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget ``-tokens_to_remove`` columns; a positive number is the length to keep."""
        count = int(tokens_to_remove)
        length = self.get_seq_length()
        kept = min(count, length) if count > 0 else max(length + count, 0)
        if kept < length:
            self._live().crop(kept)
            self.ids = self.ids[:, :kept]

    def reset(self) -> None:
        """Forget all columns."""
        self.crop(-self.get_seq_length())

    def release(self) -> None:
        """Close the session; the ids stay."""
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse keys and values: they live in the engine's workspace.

        Raises:
            InputError: always.
        """
        raise InputError(
            "this cache came out of a hybrid_fx generate and holds no keys; pass it to "
            "generate() with the whole sequence as input_ids, or call the model without it"
        )

    def _live(self) -> Session:
        if self.session is None:
            self.update()
        return self.session


def drop_finished(kwargs: dict[str, Any], ids: Tensor | None) -> dict[str, Any]:
    """``kwargs`` without a finished :class:`SessionCache`; its columns are computed again.

    Args:
        kwargs: The keyword arguments of a generate call.
        ids: Its prompt, ``[B, T]``.

    Raises:
        InputError: where the prompt does not begin with the cached tokens.
    """
    cache = cache_of(kwargs)
    if not isinstance(cache, SessionCache):
        return kwargs
    columns = cache.get_seq_length()
    head = ids[:, :columns].to(cache.ids) if isinstance(ids, Tensor) and ids.dim() == 2 else None
    if head is None or not torch.equal(head, cache.ids):
        got = list(ids.shape) if isinstance(ids, Tensor) else None
        raise InputError(
            f"{cache_argument()} holds tokens {list(cache.ids.shape)}, and input_ids {got} does "
            "not begin with them; pass the whole sequence, prefix included"
        )
    return {key: value for key, value in kwargs.items() if key != cache_argument()}
