"""Random graphs and the claims that every pass must hold on them, for passes of your own.

::

    @given(graphs())
    def test_my_pass(example):
        check_pass(MY_PASS, example)

Needs hypothesis, which the extra ``test`` brings.
"""

from __future__ import annotations

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "hybrid_fx.testing draws its graphs with hypothesis, which is not installed; "
        "the extra `test` brings it: pip install 'hybrid_fx[test]'",
        name="hypothesis",
    ) from error

from .builder import Builder
from .claims import check_hoist, check_pass, check_pipeline, check_same, check_settled
from .decoders import decoders
from .example import Example
from .graphs import context_of, graphs
from .orders import orders
from .probe import ProbingBuilder
from .run import run
from .spellings import captured

__all__ = [
    "Builder",
    "Example",
    "ProbingBuilder",
    "captured",
    "check_hoist",
    "check_pass",
    "check_pipeline",
    "check_same",
    "check_settled",
    "context_of",
    "decoders",
    "graphs",
    "orders",
    "run",
]
