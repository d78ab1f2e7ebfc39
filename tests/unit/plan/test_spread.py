"""Where the numbers of a model lie, without a rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.errors import ConfigError
from hopescale.model.build import build_predictor
from hopescale.optim.shard_map import Team
from hopescale.parallel.schema import ParallelConfig
from hopescale.plan.spread import Model, Parameter, Spread, model_of

SMALL = ("experiment=demo", "model.width=48", "model.block_pattern=[S,H]")
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "hsdp": {"replicate": 2},
    "ddp": {"engine": "ddp"},
    **{f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
ZERO = ("zero1", "zero2", "zero3")
WORLD_SIZES = (1, 2, 3, 5)


@lru_cache
def small() -> Config:
    return load_config(SMALL)


@lru_cache
def small_model() -> Model:
    return model_of(small())


def toy() -> Model:
    """80 numbers: 10, and two blocks of 24 + 8 + 3."""
    block = (("fc1", (6, 4)), ("fc2", (4, 2)), ("bias", (3,)))
    parameters = [Parameter(f"blocks.{n}.{name}", shape) for n in range(2) for name, shape in block]
    groups = (
        {"name": "matrices", "algorithm": "m3", "param_names": ["blocks.1.fc1", "blocks.0.fc1"]},
        {"name": "others", "algorithm": "adamw", "param_names": ["embed"]},
    )
    return Model((Parameter("embed", (10,)), *parameters), groups, 2)


def spread_of(engine: str, world_size: int, model: Model | None = None, **parallel: Any) -> Spread:
    config = small().model_copy(update={"parallel": ParallelConfig(**ENGINES[engine], **parallel)})
    return Spread(config, model or toy(), world_size)


def of(model: Model, *names: str) -> list[Parameter]:
    return [p for name in names for p in model.parameters if p.name == name]


def test_a_model_has_the_parameters_of_the_predictor_in_its_order() -> None:
    with torch.device("meta"):
        predictor = build_predictor(small().model)
    model = small_model()
    assert [(p.name, p.shape) for p in model.parameters] == [
        (n, tuple(p.shape)) for n, p in predictor.named_parameters()
    ]
    assert model.numel == 61_072
    assert model.num_blocks == len(model.blocks) == 2


def test_blocks_and_ends_hold_every_parameter_once() -> None:
    model = small_model()
    assert [p.name for p in model.ends][:2] == ["embed.weight", "embed.bias"]
    assert sorted(p for block in [model.ends, *model.blocks] for p in block) == sorted(model.parameters)
    # qkv 3 x 48 x 48 + 3 x 48, project 48 x 48 + 48, fc1 and fc2 of 96 x 48, norms and biases.
    assert sum(p.numel for p in model.blocks[0]) == 6912 + 144 + 2304 + 48 + 2 * 4608 + 96 + 48 + 4 * 48


def test_blocks_are_told_apart_by_their_whole_number() -> None:
    names = [f"blocks.{n}.w" for n in range(11)]
    model = Model(tuple(Parameter(name, (2, 2)) for name in names), (), 11)
    assert [[p.name for p in block] for block in model.blocks] == [[name] for name in names]


@pytest.mark.parametrize(
    ("engine", "world_size", "seen_as", "degrees"),
    [
        ("fsdp", 4, "fsdp", (1, 4)),
        ("fsdp", 1, "ddp", (1, 1)),
        ("hsdp", 6, "fsdp", (2, 3)),
        ("hsdp", 2, "ddp", (2, 1)),
        ("ddp", 3, "ddp", (3, 1)),
        ("zero0", 3, "zero0", (3, 1)),
        ("zero3", 3, "zero3", (1, 3)),
    ],
)
def test_the_engine_says_what_is_sharded(engine: str, world_size: int, seen_as: str, degrees: tuple[int, int]) -> None:
    spread = spread_of(engine, world_size)
    assert (spread.engine, tuple(spread.degrees)) == (seen_as, degrees)


def test_ranks_that_cannot_be_arranged_are_an_error() -> None:
    with pytest.raises(ConfigError, match="must divide the number of ranks, 3"):
        _ = spread_of("hsdp", 3).degrees


def test_m3_sees_shards_copies_or_one_rank() -> None:
    assert spread_of("fsdp", 1).team == Team((0,), (0,))
    assert spread_of("ddp", 2).team == Team((0, 0), (0, 1))
    assert spread_of("hsdp", 4).team == Team((0, 1, 0, 1), (0, 0, 1, 1))
    assert spread_of("zero2", 3).team == Team((0, 1, 2), (0, 0, 0))


def test_the_parameters_of_m3_come_in_the_order_of_its_groups() -> None:
    assert [p.name for p in spread_of("fsdp", 2).m3_parameters] == ["blocks.1.fc1", "blocks.0.fc1"]
    assert sum(p.numel for p in Spread(small(), small_model(), 2).m3_parameters) == 18_432 + 18_432 + 15_360


@pytest.mark.parametrize(
    ("engine", "held"),
    [
        # On three ranks a bias keeps 1, fc1 2 x 4 numbers, fc2 2 x 2 (and 0 on the last rank), the embedding 4.
        ("fsdp", (80, 41, 30, 24)),
        ("ddp", (80, 80, 80, 80)),
        ("zero0", (80, 80, 80, 80)),
        # 80 / 2; 84 / 3, for each rank's part is even; 80 / 5.
        ("zero1", (80, 40, 28, 16)),
        ("zero2", (80, 40, 28, 16)),
        # On five ranks 2 of the embedding, and 5 + 2 + 1 of each block.
        ("zero3", (80, 41, 28, 18)),
    ],
)
def test_the_rank_with_most_holds_its_part_and_the_padding(engine: str, held: tuple[int, ...]) -> None:
    spreads = [spread_of(engine, world_size) for world_size in WORLD_SIZES]
    assert tuple(spread.held(spread.model.parameters) for spread in spreads) == held


def test_copies_do_not_thin_out_what_a_rank_holds() -> None:
    assert spread_of("hsdp", 4).held(toy().parameters) == spread_of("fsdp", 2).held(toy().parameters) == 41


def test_tensors_of_a_parameter_count_as_often_as_there_are() -> None:
    fc1 = of(toy(), "blocks.0.fc1", "blocks.1.fc1")
    # Of ZeRO 1 on two ranks the first one holds the whole first matrix but 0 of the second, of which there are two.
    held = {name: spread_of(name, 2).held(fc1, [1, 2]) for name in ("fsdp", "ddp", *ZERO)}
    assert held == {"fsdp": 36, "ddp": 72, "zero1": 48, "zero2": 48, "zero3": 36}
    assert spread_of("zero1", 2).held(of(toy(), "blocks.0.fc2")) == 6
    assert spread_of("zero1", 2).held([]) == spread_of("fsdp", 2).held([]) == 0


@pytest.mark.parametrize(("world_size", "padded"), [(1, 80), (2, 80), (3, 84), (5, 80), (7, 84), (48, 96)])
def test_the_flat_buffer_is_filled_up_to_two_numbers_a_rank(world_size: int, padded: int) -> None:
    assert spread_of("zero1", world_size).padded == padded


def test_zero_1_cuts_the_parameters_one_after_the_other() -> None:
    ranges = spread_of("zero1", 2).zero_ranges
    held = {
        name: {r: place for r, place in enumerate(places) if place[0] < place[1]} for name, places in ranges.items()
    }
    assert held["embed"] == {0: (0, 10, 0)}
    assert held["blocks.0.fc2"] == {0: (0, 6, 34), 1: (6, 8, 0)}
    assert held["blocks.0.bias"] == {1: (0, 3, 2)}
    assert held["blocks.1.fc1"] == {1: (0, 24, 5)}


def test_zero_3_cuts_every_parameter_into_equal_parts() -> None:
    ranges = spread_of("zero3", 3).zero_ranges
    assert ranges["embed"] == [(0, 4, 0), (4, 8, 0), (8, 10, 0)]
    assert ranges["blocks.0.fc1"] == [(0, 8, 4), (8, 16, 4), (16, 24, 4)]
    assert ranges["blocks.0.fc2"] == [(0, 3, 12), (3, 6, 12), (6, 8, 12)]
    assert ranges["blocks.0.bias"] == [(0, 1, 15), (1, 2, 15), (2, 3, 15)]


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("engine", ["fsdp", *ZERO])
def test_every_number_of_a_matrix_lies_on_one_rank(engine: str, world_size: int) -> None:
    spread = spread_of(engine, world_size, model=small_model())
    matrices = spread.m3_parameters
    layouts = spread.layouts(matrices)
    assert [sum(map(sum, layout.sizes)) for layout in layouts] == [p.numel for p in matrices]
    most = max(sum(sum(layout.sizes[rank]) for layout in layouts) for rank in range(world_size))
    assert most <= spread.held(matrices) <= most + len(matrices) * max(max(p.shape) for p in matrices)


def test_a_copy_on_every_rank_is_whole() -> None:
    spread = spread_of("ddp", 3, model=small_model())
    assert all(layout.is_whole and len(layout.pieces) == 1 for layout in spread.layouts(spread.m3_parameters))


SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)


def drawn_model(shapes: Sequence[tuple[int, ...]]) -> Model:
    return Model(tuple(Parameter(f"p{n}", shape) for n, shape in enumerate(shapes)), (), 0)


@settings(max_examples=80, deadline=None)
@given(shapes=SHAPES, world_size=st.integers(2, 9), engine=st.sampled_from(ZERO))
def test_zero_holds_every_number_once_and_in_a_place_of_its_own(
    shapes: list[tuple[int, ...]], world_size: int, engine: str
) -> None:
    spread = spread_of(engine, world_size, model=drawn_model(shapes))
    ranges, part = spread.zero_ranges, spread.padded // world_size
    for parameter in spread.model.parameters:
        held = [number for start, stop, _ in ranges[parameter.name] for number in range(start, stop)]
        assert held == list(range(parameter.numel))
    for rank in range(world_size):
        places = sorted(
            (at, at + stop - start) for start, stop, at in (r[rank] for r in ranges.values()) if stop > start
        )
        assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
        room = spread.held(spread.model.parameters) if engine == "zero3" else part
        assert all(begin >= 0 and end <= room for begin, end in places)


@settings(max_examples=80, deadline=None)
@given(shapes=SHAPES, world_size=st.integers(2, 9), engine=st.sampled_from(ZERO))
def test_zero_gives_no_rank_more_than_is_held_at_most(
    shapes: list[tuple[int, ...]], world_size: int, engine: str
) -> None:
    spread = spread_of(engine, world_size, model=drawn_model(shapes))
    numbers = [sum(r[rank][1] - r[rank][0] for r in spread.zero_ranges.values()) for rank in range(world_size)]
    assert sum(numbers) == sum(math.prod(shape) for shape in shapes)
    assert max(numbers) == spread.held(spread.model.parameters)


@settings(max_examples=80, deadline=None)
@given(shape=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), world_size=st.integers(2, 9))
def test_fsdp_holds_the_largest_chunk_that_torch_would_make(shape: tuple[int, ...], world_size: int) -> None:
    parameter = Parameter("p", shape)
    held = spread_of("fsdp", world_size, model=drawn_model([shape])).held([parameter])
    if any(size % world_size == 0 for size in shape):
        assert held == math.prod(shape) // world_size
    else:
        assert held == torch.empty(shape).chunk(world_size)[0].numel()


def test_zero_3_leaves_small_parameters_on_every_rank() -> None:
    # But the embedding and the output of 112 x 48, qkv of 144 x 48 and six matrices of an MLP or a level of 96 x 48.
    spread = spread_of("zero3", 3, model=small_model())
    assert spread.kept_whole == 61_072 - 2 * 5376 - 6912 - 6 * 4608


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (3, 6), (8, 22), (10, 32), (23, 32), (24, 80)])
def test_how_small_they_are_can_be_set(limit: int, kept: int) -> None:
    threshold = {"stage3_param_persistence_threshold": limit}
    assert spread_of("zero3", 3, zero_optimization=threshold).kept_whole == kept


def test_shards_that_do_not_divide_most_parameters_are_told_with_a_number_that_does() -> None:
    assert spread_of("fsdp", 4).uneven_shards() is None
    said = "a rank holds and sends 1.6 times an even share: 8 shards do not divide most parameters"
    assert spread_of("fsdp", 8).uneven_shards() == f"{said}; parallel=fsdp parallel.shard=4 would"
    odd = "a rank holds and sends 1.4 times an even share: 7 shards do not divide most parameters"
    assert spread_of("fsdp", 7).uneven_shards() == f"{odd}; another number of ranks would"
    # Flat ranges are even, whatever the dims.
    assert spread_of("zero1", 7).uneven_shards() is None
