"""From a captured graph to a Plan: prepare, prefill and decode as generated source."""
