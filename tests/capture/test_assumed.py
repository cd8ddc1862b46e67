"""What a trace writes into libraries does not matter; into a user's files it does."""

from __future__ import annotations

import pytest

from hybrid_fx.capture.assumed import _is_library


@pytest.mark.parametrize(
    ("source", "library"),
    [
        ("G['__import_transformers_dot_modeling_utils']._CACHE", True),
        ("G['__import_torch']._state", True),
        ("G['__import_transformers_modules_dot_mine'].CALLS", False),
        ("G['__import_torchtune'].CALLS", False),
        ("L['model'].model.layers.0.calls", False),
    ],
)
def test_a_file_of_a_user_is_no_librarys_whatever_its_name_begins_with(
    source: str, library: bool
) -> None:
    assert _is_library(source) == library
