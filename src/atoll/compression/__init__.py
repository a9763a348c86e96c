"""Fewer bytes for an update, in ways that sums survive."""
