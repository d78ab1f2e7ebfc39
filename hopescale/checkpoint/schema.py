"""The `checkpoint` section of the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class CheckpointConfig(BaseModel):
    """When to save and how much to keep."""

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    every: Annotated[int, Field(ge=0)] = 500
    """Steps between two checkpoints; 0 saves only at the end of the run."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Newest committed checkpoints kept; older ones are deleted after a newer one is committed."""
