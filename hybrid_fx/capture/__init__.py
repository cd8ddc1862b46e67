"""Capture: a decoder's cache-free forward as one graph at torch level."""

from .assumptions import assumptions
from .capture import Captured, capture, capture_call

__all__ = ["Captured", "assumptions", "capture", "capture_call"]
