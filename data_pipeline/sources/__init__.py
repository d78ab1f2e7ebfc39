"""Clips as people store them, read as one thing."""
