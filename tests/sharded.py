"""What programs of several ranks share: whole tensors, and what travels between ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def recorded_exchanges() -> Iterator[list[int]]:
    """Bytes that this rank sends to others in each all-to-all inside."""
    exchange, sent_bytes = dist.all_to_all_single, []

    def recording(received: Tensor, sent: Tensor, sizes_in: Any, sizes_out: list[int], *rest: Any, **more: Any) -> Any:
        sent_bytes.append((sum(sizes_out) - sizes_out[dist.get_rank()]) * sent.element_size())
        return exchange(received, sent, sizes_in, sizes_out, *rest, **more)

    with patch.object(dist, "all_to_all_single", recording):
        yield sent_bytes
