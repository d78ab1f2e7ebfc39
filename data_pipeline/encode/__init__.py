"""Pixels to features, by a frozen encoder."""

from data_pipeline.encode.run import encode

__all__ = ["encode"]
