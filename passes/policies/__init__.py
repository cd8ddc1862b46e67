"""Policies: what each decoder family looks like, as data."""
