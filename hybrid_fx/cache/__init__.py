"""Plans kept by structure, in memory and on disk."""
