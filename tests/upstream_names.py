"""Names of the transformers that tests run on."""

from __future__ import annotations

from hybrid_fx.compat.transformers import cache_argument

#: Of the KV cache: the argument of generate and forward, and the field of their outputs.
CACHE = cache_argument()
