"""Capture: a decoder's cache-free forward as one graph at torch level."""

from .assumptions import assumptions, function_modes, options_of_dynamo
from .capture import Captured, capture, capture_call
from .linear_seam import plain_linear

__all__ = [
    "Captured",
    "assumptions",
    "capture",
    "capture_call",
    "function_modes",
    "options_of_dynamo",
    "plain_linear",
]
