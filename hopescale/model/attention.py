"""Multi-head attention with rotary positions, within each frame or over all frames."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 100.0
"""Slowest angle per place is about 1 / base: grids and clips are tens of places long, not thousands."""


class KeyValueCache(NamedTuple):
    """Keys and values of the frames an attention over all frames has seen."""

    key: Float[Tensor, "batch heads tokens features"]
    value: Float[Tensor, "batch heads tokens features"]


class Attention(nn.Module):
    """Scaled dot-product attention over patch and conditioning tokens.

    Rotary positions have the axes (frame, row, column), an equal share of a head's features each; within one frame
    only row and column, for an angle that all tokens share changes nothing. Conditioning tokens, which stand first in
    a frame, sit at row and column 0.
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int], scope: Literal["frame", "clip"]) -> None:
        super().__init__()
        self.heads, self.grid, self.scope = heads, grid, scope
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        cache: KeyValueCache | None = None,
        *,
        frame_offset: int = 0,
        keep_state: bool = False,
    ) -> tuple[Float[Tensor, "batch frames tokens width"], KeyValueCache | None]:
        """Attend.

        Args:
            x: normalised tokens of consecutive frames.
            cache: frames before them (scope "clip" only).
            frame_offset: number in the clip of the first frame of x.
            keep_state: return the cache extended by these frames (scope "clip" only).
        """
        batch, frames, tokens, width = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind(0)
        place = token_places(frames, tokens, self.grid, frame_offset, x.device)
        angles = rotary_angles(place if self.scope == "clip" else place[..., 1:], width // self.heads)
        q, k = rotate(q, angles), rotate(k, angles)
        if self.scope == "frame":
            q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v)
            out = out.unflatten(0, (batch, frames)).permute(0, 1, 3, 2, 4)
            return self.project(out.flatten(-2)), None
        q, k, v = (t.flatten(2, 3) for t in (q, k, v))
        if cache is not None:
            k, v = torch.cat([cache.key, k], dim=2), torch.cat([cache.value, v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_frame_causal(frames, tokens, k.shape[2], x.device))
        out = out.unflatten(2, (frames, tokens)).permute(0, 2, 3, 1, 4)
        if not keep_state:
            return self.project(out.flatten(-2)), None
        # What leaves a sharded module must not be a view of what lives inside it.
        return self.project(out.flatten(-2)), KeyValueCache(*((k, v) if cache is not None else (k.clone(), v.clone())))


def token_places(
    frames: int, tokens: int, grid: tuple[int, int], frame_offset: int, device: torch.device
) -> Int[Tensor, "frames tokens axes"]:
    """Frame, row and column of every token."""
    patch = torch.arange(tokens, device=device) - (tokens - grid[0] * grid[1])
    row = torch.where(patch < 0, 0, patch // grid[1])
    column = torch.where(patch < 0, 0, patch % grid[1])
    frame = torch.arange(frames, device=device) + frame_offset
    return torch.stack([axis.expand(frames, tokens) for axis in (frame[:, None], row, column)], dim=-1)


def rotary_angles(places: Int[Tensor, "frames tokens axes"], features: int) -> Float[Tensor, "frames tokens pairs"]:
    """Angles of all rotated feature pairs of a head, fp32.

    Each axis turns an equal number of pairs, at rates that fall geometrically from 1; features that do not fill
    such a set are not rotated.
    """
    per_axis = features // (2 * places.shape[-1])
    rate = ROTARY_BASE ** -(torch.arange(per_axis, device=places.device, dtype=torch.float32) / per_axis)
    return (places[..., None].float() * rate).flatten(-2)


def rotate(
    x: Float[Tensor, "batch heads frames tokens features"], angles: Float[Tensor, "frames tokens pairs"]
) -> Float[Tensor, "batch heads frames tokens features"]:
    """Turn the first 2 x pairs features of every token by its angles."""
    pairs = angles.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _frame_causal(frames: int, tokens: int, num_keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    before = num_keys - frames * tokens
    query_frame = torch.arange(frames * tokens, device=device) // tokens
    key_frame = (torch.arange(num_keys, device=device) - before).div(tokens, rounding_mode="floor")
    return key_frame[None, :] <= query_frame[:, None]
