"""What the transformers that tests run on calls things, and what it asks for."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.version import Version
from transformers.integrations import peft

from hybrid_fx.compat.transformers import cache_argument

#: Of the KV cache: the argument of generate and forward, and the field of their outputs.
CACHE = cache_argument()

_WANTED, _HAD = peft.MIN_PEFT_VERSION, importlib.metadata.version("peft")

#: Of tests in which transformers itself puts adapters into a model.
adapters_of_transformers = pytest.mark.skipif(
    Version(_HAD) < Version(_WANTED),
    reason=f"this transformers wants PEFT {_WANTED} for its own adapters; {_HAD} is installed",
)
