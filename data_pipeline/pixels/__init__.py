"""Pixels of clips: simulated, stored, or decoded from video."""
