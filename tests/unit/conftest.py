"""What unit tests of several packages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hopescale.parallel.process_group import Launch, process_group
from hopescale.parallel.schema import ParallelConfig


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A gloo group of this process alone."""
    with process_group(ParallelConfig(), Launch(), torch.device("cpu")):
        yield
