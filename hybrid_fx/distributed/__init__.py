"""Generating under DeepSpeed: the front door, the engine's class, shards and their gathering."""
