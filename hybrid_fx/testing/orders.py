"""Random orders of passes that their contracts permit."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from ..passes.contract import Pass, Pipeline, PipelineError

_CANONICAL = frozenset({"canonical"})


@st.composite
def orders(
    draw: st.DrawFn, passes: Iterable[Pass], *, given: frozenset[str] = _CANONICAL
) -> Pipeline:
    """A pipeline of some of ``passes`` in any order that their contracts permit.

    Args:
        given: Facts that hold for the graphs that it is run on.
    """
    made = Pipeline(given=given)
    for one in draw(st.permutations(tuple(passes))):
        try:
            made = Pipeline((*made.passes, one), given=given)
        except PipelineError:  # it would have to stand elsewhere
            continue
    return made
