"""A learned mixing over the tokens of a frame."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class SpatialMixing(nn.Module):
    """Per frame and feature: second(GELU(first(tokens))), without biases.

    The second matrix starts at zero (see `init.py`), so a fresh block is the block without mixing.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_tokens, num_tokens, bias=False)
        self.second = nn.Linear(num_tokens, num_tokens, bias=False)

    def forward(self, x: Float[Tensor, "batch frames tokens width"]) -> Float[Tensor, "batch frames tokens width"]:
        """Mix the tokens of each frame."""
        return self.second(F.gelu(self.first(x.transpose(-1, -2)))).transpose(-1, -2)
