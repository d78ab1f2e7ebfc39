from __future__ import annotations

import pytest

from hopescale.errors import ConfigError
from hopescale.parallel.mesh import degrees_of
from hopescale.parallel.schema import ParallelConfig


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({}, 6, (1, 6)),
        ({"replicate": 2}, 6, (2, 3)),
        ({"shard": 2}, 6, (3, 2)),
        ({"shard": 3, "replicate": 2}, 6, (2, 3)),
        ({"engine": "ddp"}, 4, (4, 1)),
        ({"engine": "deepspeed", "zero_stage": 0}, 4, (4, 1)),
        ({"engine": "deepspeed", "zero_stage": 3}, 4, (1, 4)),
    ],
)
def test_ranks_are_arranged_as_asked(settings: dict, ranks: int, expected: tuple[int, int]) -> None:
    assert degrees_of(ParallelConfig(**settings), ranks) == expected


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({"shard": 4}, 6, "parallel.shard=4: must divide the number of ranks, 6.*one of 1, 2, 3, 6"),
        ({"replicate": 4}, 2, "parallel.replicate=4: must divide the number of ranks, 2"),
        ({"shard": 2, "replicate": 2}, 8, "replicate=2: with parallel.shard=2 arranges 4 .*replicate=null"),
        ({"shard": 3, "replicate": 2}, 8, "replicate=2: with parallel.shard=3 arranges 6 .*; 3 must divide the ranks"),
    ],
)
def test_degrees_that_do_not_divide_the_ranks_are_refused(settings: dict, ranks: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        degrees_of(ParallelConfig(**settings), ranks)
