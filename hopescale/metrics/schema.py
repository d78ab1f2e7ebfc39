"""The `metrics` section of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class MetricsConfig(BaseModel):
    """What is measured, how often, and who may read it while the run lives."""

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    every: Annotated[int, Field(ge=1)] = 10
    """Log every this many steps; between two log steps all numbers stay on the device."""

    listen: Literal["off", "loopback", "node"] = "loopback"
    """Who can scrape Prometheus metrics: nobody, this machine, or the network (node needs metrics.token_file)."""

    port: Annotated[int, Field(ge=0, le=65535)] = 9177
    """TCP port of the node's endpoint; 0 picks a free one, printed and written to metrics-endpoint.json in the run."""

    token_file: str | None = None
    """File whose content scrapers must send as bearer token; without it only loopback is served."""

    discovery: str | None = None
    """Folder that Prometheus reads targets from (file_sd): each node has an entry there while the run lives."""

    textfile: str | None = None
    """Folder of node_exporter's textfile collector, for nodes where nothing may listen (metrics.listen=off)."""

    tensorboard: bool = True
    """Also write TensorBoard event files into the run folder."""
