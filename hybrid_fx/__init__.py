"""hybrid_fx: one model that trains, and generates from rewritten FX graphs."""

__version__ = "0.1.0"
