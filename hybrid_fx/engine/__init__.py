"""The engine: modes, weight versions, statistics and reports."""
