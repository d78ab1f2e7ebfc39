"""What ranks send each other in a step, by figures that were worked out by hand."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.parallel.schema import ParallelConfig
from hopescale.plan.optimizer import schedule_of
from hopescale.plan.spread import Model, Parameter, Spread, model_of
from hopescale.plan.traffic import Collective, Share, by_kind, collectives, share_of

SMALL = ("experiment=demo", "model.width=48", "model.block_pattern=[S,H]")
FRAMES = 8
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "hsdp": {"replicate": 2},
    "ddp": {"engine": "ddp"},
    **{f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
AT_ONCE = Share(clips=4, micro_batches=1, micro_batch=4)
IN_THREE = Share(clips=6, micro_batches=3, micro_batch=2)


@lru_cache
def small(*overrides: str) -> Config:
    return load_config([*SMALL, *overrides])


def toy() -> Model:
    """80 numbers in two groups: 10, and two blocks of 24 + 8 + 3."""
    block = (("fc1", (6, 4)), ("fc2", (4, 2)), ("bias", (3,)))
    parameters = [Parameter(f"blocks.{n}.{name}", shape) for n in range(2) for name, shape in block]
    groups = ({"algorithm": "adamw", "param_names": []}, {"algorithm": "adamw", "param_names": []})
    return Model((Parameter("embed", (10,)), *parameters), groups, 2)


def over(config: Config, engine: str, **parallel: Any) -> Config:
    return config.model_copy(update={"parallel": ParallelConfig(**ENGINES[engine], **parallel)})


def sent_with(
    engine: str, world_size: int, *overrides: str, share: Share = AT_ONCE, **parallel: Any
) -> list[Collective]:
    """By the toy model, of which a clip takes two passes: teacher and jump; but for the word that every step sends."""
    found = collectives(Spread(over(small(*overrides), engine, **parallel), toy(), world_size), None, share, FRAMES)
    if world_size > 1:
        sent = round(48 * 2 * (world_size - 1) / world_size)
        assert found.pop() == Collective("control", "all_reduce", world_size, 1, 1, 48, sent)
    return found


@pytest.mark.parametrize(
    ("batch", "micro_batch", "world_size", "expected"),
    [
        (16, None, 4, Share(4, 1, 4)),
        (16, None, 3, Share(6, 1, 6)),
        (16, 2, 3, Share(6, 3, 2)),
        (16, 4, 2, Share(8, 2, 4)),
        # Two of 3 and 2 rather than of 4 and 1.
        (10, 4, 2, Share(5, 2, 3)),
        (16, 16, 4, Share(4, 1, 4)),
    ],
)
def test_a_rank_takes_its_clips_in_even_micro_batches(
    batch: int, micro_batch: int | None, world_size: int, expected: Share
) -> None:
    train = small().train.model_copy(update={"global_batch": batch, "micro_batch": micro_batch})
    assert share_of(small().model_copy(update={"train": train}), world_size) == expected


@given(clips=st.integers(1, 200), micro_batch=st.integers(1, 64), world_size=st.integers(1, 32))
def test_micro_batches_hold_all_clips_and_none_is_too_large(clips: int, micro_batch: int, world_size: int) -> None:
    train = small().train.model_copy(update={"global_batch": clips, "micro_batch": micro_batch})
    share = share_of(small().model_copy(update={"train": train}), world_size)
    assert share.clips * world_size >= clips > (share.clips - 1) * world_size
    assert share.micro_batch <= micro_batch
    assert share.micro_batches * share.micro_batch >= share.clips


def test_fsdp_gathers_blocks_in_both_directions_of_every_pass() -> None:
    # A rank's pieces: 5, and of each block 12 + 4 + 2. Blocks 2 passes x 2 directions, 5 once: 4 x 36 + 5 = 149.
    # Gradients of 41 on each of 2 ranks; two norms of 8 bytes.
    assert sent_with("fsdp", 2) == [
        Collective("parameters", "all_gather", 2, 1, 9, 596, 596),
        Collective("gradients", "reduce_scatter", 2, 1, 3, 328, 164),
        Collective("norms", "all_reduce", 2, 1, 1, 16, 16),
    ]


def test_pieces_of_fsdp_that_do_not_come_out_even_are_padded() -> None:
    # 4, and of each block 8 + 4 + 1: 4 x 26 + 4 = 108 to two others; gradients 3 x 30, of which a third stays.
    assert sent_with("fsdp", 3) == [
        Collective("parameters", "all_gather", 3, 1, 9, 432, 864),
        Collective("gradients", "reduce_scatter", 3, 1, 3, 360, 240),
        Collective("norms", "all_reduce", 3, 1, 1, 16, 21),
    ]


def test_blocks_that_are_kept_after_forward_are_gathered_half_as_often() -> None:
    gathered, reduced, _ = sent_with("fsdp", 2, reshard_after_forward=False)
    # 2 x 36 + 5 = 77 numbers.
    assert gathered == Collective("parameters", "all_gather", 2, 1, 5, 308, 308)
    assert reduced == sent_with("fsdp", 2)[1]


def test_fsdp_gathers_anew_in_every_micro_batch_and_reduces_in_the_last_one() -> None:
    gathered, reduced, norms = sent_with("fsdp", 2, share=IN_THREE)
    assert gathered == Collective("parameters", "all_gather", 2, 1, 27, 1788, 1788)
    # Of blocks twice, once with what has waited and once more: 2 x 36 + 5 numbers on each of 2 ranks.
    assert reduced == Collective("gradients", "reduce_scatter", 2, 1, 5, 616, 308)
    assert norms.input_bytes == 16


def test_one_pass_reduces_once_however_many_micro_batches_there_are() -> None:
    gathered, reduced, _ = sent_with("fsdp", 2, "objective.jump_weight=0", share=IN_THREE)
    # 3 x (2 x 36 + 5) = 231.
    assert (gathered.count, gathered.input_bytes) == (15, 924)
    assert reduced == Collective("gradients", "reduce_scatter", 2, 1, 3, 328, 164)


def test_copies_of_shards_add_up_their_pieces_over_ranks_that_are_apart() -> None:
    assert sent_with("hsdp", 4) == [
        Collective("parameters", "all_gather", 2, 1, 9, 596, 596),
        Collective("gradients", "reduce_scatter", 2, 1, 3, 328, 164),
        Collective("gradients", "all_reduce", 2, 2, 3, 164, 164),
        Collective("norms", "all_reduce", 2, 1, 1, 16, 16),
    ]
    assert [each.stride for each in sent_with("hsdp", 6) if each.kind == "all_reduce"] == [3, 1]


@pytest.mark.parametrize(("world_size", "sent"), [(2, 320), (4, 480), (5, 512)])
def test_replicas_reduce_whole_gradients_and_gather_nothing(world_size: int, sent: int) -> None:
    assert sent_with("ddp", world_size) == [Collective("gradients", "all_reduce", world_size, 1, 3, 320, sent)]


def test_zero_0_reduces_whole_gradients_in_buckets() -> None:
    assert sent_with("zero0", 4) == [Collective("gradients", "all_reduce", 4, 1, 1, 320, 480)]


def test_zero_1_reduces_everywhere_and_gathers_the_padded_buffer() -> None:
    # 84 numbers, 28 a rank.
    expected = [
        Collective("gradients", "all_reduce", 3, 1, 1, 320, 427),
        Collective("parameters", "all_gather", 3, 1, 1, 112, 224),
        Collective("norms", "all_reduce", 3, 1, 1, 16, 21),
    ]
    assert sent_with("zero1", 3) == sent_with("zero1", 3, share=IN_THREE) == expected


def test_zero_2_reduces_every_micro_batch() -> None:
    reduced, gathered, _ = sent_with("zero2", 3, share=IN_THREE)
    assert reduced == Collective("gradients", "all_reduce", 3, 1, 3, 960, 1280)
    assert gathered == sent_with("zero2", 3)[1]


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_small_buckets_are_more_collectives_of_the_same_bytes(engine: str) -> None:
    few, many = sent_with(engine, 2), sent_with(engine, 2, zero_optimization={"reduce_bucket_size": 30})
    buckets = [next(each for each in found if each.what == "gradients") for found in (few, many)]
    assert [each.count for each in buckets] == [1, 3]
    assert len({each.input_bytes for each in buckets}) == 1


def test_zero_3_leaves_small_parameters_out_and_brings_them_up_to_date() -> None:
    # All 80 numbers are fewer than what it leaves whole.
    reduced, fetched, updated, own, norms = sent_with("zero3", 2)
    assert reduced == Collective("gradients", "reduce_scatter", 2, 1, 1, 320, 160)
    assert (fetched.input_bytes, fetched.sent_bytes) == (0, 0)
    assert updated == Collective("parameters", "all_gather", 2, 1, 1, 160, 160)
    assert (own.what, own.input_bytes, norms.input_bytes) == ("norms", 8, 16)


def test_zero_3_fetches_matrices_in_both_directions_of_every_pass() -> None:
    large = {"stage3_param_persistence_threshold": 10}
    _, fetched, updated, *_ = sent_with("zero3", 2, recompute="none", zero_optimization=large)
    # Two fc1 of 24 numbers, 12 a rank; two passes, forward and backward. 32 are left whole.
    assert (fetched.kind, fetched.input_bytes, fetched.sent_bytes) == ("all_gather", 4 * 4 * 24, 4 * 4 * 24)
    assert updated.input_bytes == 64
    # Run again, a block fetches all but its last product, and here that is left whole.
    again = sent_with("zero3", 2, recompute="block", zero_optimization=large)[1]
    assert again.input_bytes == 2 * 4 * 3 * 24


def test_a_block_that_runs_again_does_not_fetch_its_last_product() -> None:
    every = {"stage3_param_persistence_threshold": 0}
    once, again, with_drop_path = (
        sent_with("zero3", 2, *overrides, recompute=recompute, zero_optimization=every)[1]
        for recompute, *overrides in (("none",), ("block",), ("block", "model.drop_path=0.1"))
    )
    # 5, and of each block 12 + 4 + 2: two passes, twice; again 14 of each block, its fc2 apart.
    assert once.input_bytes == 2 * 4 * 2 * 41
    assert again.input_bytes - once.input_bytes == 2 * 4 * 2 * 14
    # Drop-path scales what comes of the second block's.
    assert with_drop_path.input_bytes - again.input_bytes == 2 * 4 * 4


@pytest.mark.parametrize("engine", sorted(ENGINES.keys() - {"hsdp"}))
@pytest.mark.parametrize("share", [AT_ONCE, IN_THREE])
def test_one_rank_sends_nothing(engine: str, share: Share) -> None:
    assert sent_with(engine, 1, share=share) == []


@lru_cache
def small_model() -> Model:
    return model_of(small())


def exchanged(engine: str, world_size: int, *overrides: str) -> list[Collective]:
    """By M3 for the small model."""
    spread = Spread(over(small(*overrides), engine), small_model(), world_size)
    return [each for each in collectives(spread, schedule_of(spread), AT_ONCE, FRAMES) if each.what == "M3"]


def test_owners_are_sent_pieces_and_send_updates_back() -> None:
    (found,) = exchanged("fsdp", 2, "optimizer.plan=owner")
    assert (found.kind, found.ranks, found.stride, found.count) == ("all_to_all", 2, 1, 2)
    # Of 52,224 numbers each rank holds half: the others' halves of what it owns come in, and updates go back.
    numbers = 18_432 + 18_432 + 15_360
    assert numbers * 4 / 2 <= found.sent_bytes <= 1.1 * numbers * 4 / 2
    # What a rank keeps is packed too: all of its pieces, and all of its matrices.
    assert numbers * 4 <= found.input_bytes <= 1.1 * numbers * 4


def test_copies_that_repeat_the_work_exchange_inside_a_copy_alone() -> None:
    slow = ("optimizer.plan=owner", "optimizer.plan.across_bandwidth=1e3", "optimizer.plan.across_latency=1.0")
    (inside,) = exchanged("hsdp", 4, *slow)
    assert inside.ranks == 2
    assert inside == exchanged("fsdp", 2, "optimizer.plan=owner")[0]


def test_copies_that_share_the_work_exchange_over_all_ranks() -> None:
    quick = ("optimizer.plan.across_bandwidth=1e15", "optimizer.plan.across_latency=1e-9", "optimizer.plan.flops=1e6")
    (across,) = exchanged("hsdp", 4, *quick)
    assert across.ranks == 4


def test_a_plan_without_exchanges_sends_nothing() -> None:
    assert exchanged("ddp", 2, "optimizer.plan=local") == []
    assert exchanged("fsdp", 1) == []


def test_bytes_of_a_kind_are_added_up() -> None:
    assert by_kind(sent_with("hsdp", 4)) == {"all_gather": 596, "reduce_scatter": 328, "all_reduce": 180}
    assert by_kind([]) == {}
