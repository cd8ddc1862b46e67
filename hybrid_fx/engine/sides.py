"""Which adapters ``lora="auto"`` keeps as branches beside their weights."""

from __future__ import annotations

from collections.abc import Mapping

#: Fold an adapter only where rounding takes less than this share of it.
FOLD_LIMIT = 0.05


def side_of(errors: Mapping[str, float]) -> frozenset[str]:
    """The adapted places, of those with their errors, that are not to be folded."""
    return frozenset(site for site, error in errors.items() if error >= FOLD_LIMIT)
