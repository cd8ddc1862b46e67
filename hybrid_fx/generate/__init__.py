"""Decoding loops over a session, token for token those of transformers."""
