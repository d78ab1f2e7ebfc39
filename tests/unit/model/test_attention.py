from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from hopescale.model.attention import Attention, KeyValueCache, rotary_angles, rotate, token_places

GRID = (2, 3)
TOKENS = 7  # one conditioning token before the patches
WIDTH = 32


def attention(scope: Literal["frame", "clip"], heads: int = 2) -> Attention:
    torch.manual_seed(0)
    return Attention(WIDTH, heads, GRID, scope).requires_grad_(False)


def frames(batch: int = 2, count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(batch, count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_attention_keeps_the_shape_of_its_input(scope: Literal["frame", "clip"]) -> None:
    x = frames()
    out, cache = attention(scope)(x)
    assert out.shape == x.shape
    assert cache is None


@pytest.mark.parametrize("changed", range(4))
def test_attention_within_frames_does_not_mix_them(changed: int) -> None:
    attend, x = attention("frame"), frames()
    other = x.clone()
    other[:, changed] += 1
    same = (attend(x)[0] == attend(other)[0]).flatten(2).all(dim=2).all(dim=0)
    assert same.tolist() == [t != changed for t in range(4)]


@pytest.mark.parametrize("changed", range(4))
def test_attention_over_the_clip_is_causal_by_frame(changed: int) -> None:
    attend, x = attention("clip"), frames()
    other = x.clone()
    # Another token of the same frame must be seen too, however late it stands in the frame.
    other[:, changed, -1] += 1
    differs = (attend(x)[0] != attend(other)[0]).any(dim=3).all(dim=2).all(dim=0)
    same = (attend(x)[0] == attend(other)[0]).flatten(2).all(dim=2).all(dim=0)
    assert differs[changed:].all()
    assert same[:changed].all()


def test_rotation_keeps_lengths_and_does_not_touch_leftover_features() -> None:
    x = torch.randn(1, 2, 3, TOKENS, 16, generator=torch.Generator().manual_seed(2))
    angles = rotary_angles(token_places(3, TOKENS, GRID, 1, x.device), 16)
    turned = rotate(x, angles)
    assert angles.shape == (3, TOKENS, 6)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 12:], x[..., 12:])
    assert not torch.equal(turned[..., :12], x[..., :12])


@pytest.mark.parametrize("axis", range(3))
def test_scores_depend_on_relative_places_only(axis: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 1, 12, generator=torch.Generator().manual_seed(3)).double()
    query, key, step = torch.tensor([2, 1, 2]), torch.tensor([1, 2, 0]), torch.zeros(3, dtype=torch.int64)
    step[axis] = 1

    def score(query_place: Tensor, key_place: Tensor) -> Tensor:
        return (rotate(q, angles(query_place)) * rotate(k, angles(key_place))).sum()

    def angles(place: Tensor) -> Tensor:
        return rotary_angles(place.view(1, 1, 3), 12)

    torch.testing.assert_close(score(query + step, key + step), score(query, key), rtol=1e-5, atol=1e-6)
    assert abs(score(query + step, key) - score(query, key)) > 1e-3


def test_conditioning_tokens_sit_at_the_first_row_and_column() -> None:
    places = token_places(2, TOKENS + 1, GRID, 3, torch.device("cpu"))
    assert places[:, :3].tolist() == [[[3, 0, 0]] * 3, [[4, 0, 0]] * 3]
    assert places[1, 2:, 1:].tolist() == [[row, column] for row in range(GRID[0]) for column in range(GRID[1])]


def test_frame_offset_moves_all_frames_together() -> None:
    attend, x = attention("clip"), frames()
    torch.testing.assert_close(attend(x, frame_offset=3)[0], attend(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1], [2, 2], [1, 3]])
def test_pass_with_cache_equals_one_pass(pieces: list[int]) -> None:
    attend, x = attention("clip"), frames()
    cache: KeyValueCache | None = None
    outputs, offset = [], 0
    for count in pieces:
        out, cache = attend(x[:, offset : offset + count], cache, frame_offset=offset, keep_state=True)
        outputs.append(out)
        offset += count
    whole, end = attend(x, keep_state=True)
    assert cache is not None
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cache.key, end.key)
    torch.testing.assert_close(cache.value, end.value)


def test_wrong_frame_offset_with_a_cache_gives_another_answer() -> None:
    attend, x = attention("clip"), frames()
    _, cache = attend(x[:, :3], keep_state=True)
    right = attend(x[:, 3:], cache, frame_offset=3)[0]
    assert not torch.allclose(attend(x[:, 3:], cache, frame_offset=0)[0], right, atol=1e-4)


def test_one_head_equals_attention_written_out() -> None:
    attend, x = attention("frame", heads=1), frames(batch=1, count=1)
    q, k, v = attend.qkv(x[0, 0]).split(WIDTH, dim=-1)
    angles = rotary_angles(token_places(1, TOKENS, GRID, 0, x.device)[..., 1:], WIDTH)
    q, k = (rotate(t[None, None, None], angles)[0, 0, 0] for t in (q, k))
    expected = attend.project(torch.softmax(q @ k.T / WIDTH**0.5, dim=-1) @ v)
    torch.testing.assert_close(attend(x)[0][0, 0], expected, rtol=1e-4, atol=1e-5)
