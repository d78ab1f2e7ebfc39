from __future__ import annotations

import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import ClipBatch, StepBatches
from data_pipeline.errors import DataError
from data_pipeline.reader.batches import GlobalBatches
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig, ReaderConfig
from tests.small_dataset import write_dataset


def _steps(reader: ClipReader, count: int, *, position: int = 0, **sizes: int) -> list[StepBatches]:
    batches = GlobalBatches(reader, **{"rank": 0, "world_size": 1, **sizes})  # pyright: ignore[reportArgumentType]
    batches.load_state_dict(batches.state_dict() | {"position": position})
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def _open(folder: Path, **config: Any) -> ClipReader:
    return ClipReader(DataConfig.model_validate({"path": str(folder), **config}), split="train", seed=5)


def _real(batches: list[ClipBatch]) -> list[tuple[int, str]]:
    return [
        (int(position), key)
        for batch in batches
        for position, key, weight in zip(batch.positions, batch.keys, batch.weights, strict=True)
        if weight
    ]


@settings(deadline=None, max_examples=15)
@given(
    world=st.integers(1, 8),
    micro=st.integers(1, 6),
    extra=st.integers(0, 9),
    start=st.integers(0, 60),
    threads=st.integers(1, 3),
    tail=st.sampled_from(["continuous", "drop", "pad_zero_weight"]),
)
def test_every_world_size_sees_the_same_clips_in_each_step(
    dataset: Path, world: int, micro: int, extra: int, start: int, threads: int, tail: str
) -> None:
    total, rows = 8 + extra, {"threads": threads, "batches": 1 + micro}
    if total > 14 and tail == "drop":
        return
    reader = _open(dataset, tail=tail, reader=rows)
    (whole,) = _steps(reader, 1, global_batch=total, micro_batch=total, position=start)
    parts = [
        _steps(reader, 1, global_batch=total, rank=rank, world_size=world, micro_batch=micro, position=start)[0]
        for rank in range(world)
    ]
    assert {len(part.micro) for part in parts} == {len(parts[0].micro)}
    assert all(part.num_clips == whole.num_clips == len(_real(whole.micro)) for part in parts)
    weighted = whole.micro[0].lengths[whole.micro[0].weights > 0].tolist()
    for first, end in ((0, None), (1, None), (4, 5), (2, 4)):
        expected = sum(len(range(length)[first:end]) for length in weighted)
        assert {part.num_frames(first, end) for part in parts} == {expected}
        assert sum(batch.num_frames(first, end) for part in parts for batch in part.micro) == expected
    assert [pair for part in parts for pair in _real(part.micro)] == _real(whole.micro)
    for field in ("features", "actions", "states", "extrinsics"):
        joined = torch.cat([getattr(batch, field)[batch.weights > 0] for part in parts for batch in part.micro])
        assert torch.equal(joined, getattr(whole.micro[0], field)[whole.micro[0].weights > 0])


def test_batches_hold_what_the_clips_do(reader: ClipReader) -> None:
    for step in _steps(reader, 4, global_batch=6, micro_batch=4):
        for batch in step.micro:
            alone = reader.read(np.array([reader.keys.index(key) for key in batch.keys])).to("cpu")
            assert batch.features.dtype == torch.float32
            assert batch.partitions == alone.partitions
            for field in ("features", "actions", "states", "extrinsics", "lengths"):
                assert torch.equal(getattr(batch, field), getattr(alone, field)), field


def test_a_shorter_clip_after_a_longer_one_leaves_nothing_behind(tmp_path: Path) -> None:
    write_dataset(tmp_path, clips=8, partitions=("base",), lengths=(2, 9), state_dim=1, extrinsics_dim=1)
    reader = _open(tmp_path, reader={"batches": 1, "threads": 1})
    seen = set()
    for step in _steps(reader, 20, global_batch=1, micro_batch=1):
        batch, length = step.micro[0], int(step.lengths[0])
        seen.add(length)
        assert not batch.features[0, length:].any()
        assert not batch.actions[0, length - 1 :].any()
        assert batch.states is not None
        assert not batch.states[0, length:].any()
    assert seen == {2, 9}


@settings(deadline=None, max_examples=10)
@given(stops=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4))
def test_resuming_goes_on_exactly_with_any_world_size_and_micro_batch(
    reader: ClipReader, stops: list[tuple[int, int, int]]
) -> None:
    total = sum(count for count, _, _ in stops)
    whole = [_real(step.micro) for step in _steps(reader, total, global_batch=6, micro_batch=6)]
    state, found = None, []
    for count, world, micro in stops:
        ranks = [
            GlobalBatches(reader, global_batch=6, rank=rank, world_size=world, micro_batch=micro)
            for rank in range(world)
        ]
        for batches in ranks:
            if state is not None:
                batches.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(count):
            found.append([pair for batches in ranks for pair in _real(next(batches).micro)])
        assert len({json.dumps(batches.state_dict()) for batches in ranks}) == 1
        state = ranks[0].state_dict()
        for batches in ranks:
            batches.close()
    assert found == whole
    assert len(json.dumps(state)) < 250


def test_the_size_of_a_step_may_change_on_resume(reader: ClipReader) -> None:
    stream = [key for step in _steps(reader, 6, global_batch=5, micro_batch=5) for _, key in _real(step.micro)]
    first = GlobalBatches(reader, global_batch=5, rank=0, world_size=1, micro_batch=5)
    found = [key for _ in range(2) for _, key in _real(next(first).micro)]
    second = GlobalBatches(reader, global_batch=10, rank=0, world_size=1, micro_batch=5)
    second.load_state_dict(first.state_dict())
    found += [key for _ in range(2) for _, key in _real(next(second).micro)]
    assert found == stream
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"view": ["ice"]}, "data: view"),
        ({"frames": 3}, "data: view"),
        ({"action_alignment": "first"}, "data: alignment"),
        ({"order": "windowed"}, "data: order"),
        ({"tail": "drop"}, "data: order"),
        ({"mixture": [{"view": ["base"], "weight": 1.0}, {"view": ["ice"], "weight": 1.0}]}, "data: order"),
        ({"select": {"min_frames": 5}}, "data: view"),
    ],
)
def test_a_place_in_other_data_or_another_order_is_refused(
    reader: ClipReader, dataset: Path, change: dict[str, Any], named: str
) -> None:
    state = GlobalBatches(reader, global_batch=4, rank=0, world_size=1, micro_batch=4).state_dict()
    other = GlobalBatches(_open(dataset, **change), global_batch=4, rank=0, world_size=1, micro_batch=4)
    with pytest.raises(DataError, match=named):
        other.load_state_dict(state)


def test_another_data_set_or_seed_is_refused(reader: ClipReader, dataset: Path, tmp_path: Path) -> None:
    state = GlobalBatches(reader, global_batch=4, rank=0, world_size=1, micro_batch=4).state_dict()
    write_dataset(tmp_path, clips=7, heldout=7, lengths=(4, 5, 5), state_dim=3, extrinsics_dim=2, seed=1)
    for other, named in (
        (_open(tmp_path), "data: data"),
        (ClipReader(DataConfig(path=str(dataset)), split="train", seed=6), "data: seed"),
    ):
        with pytest.raises(DataError, match=named):
            GlobalBatches(other, global_batch=4, rank=0, world_size=1, micro_batch=4).load_state_dict(state)
    with pytest.raises(DataError, match="must hold"):
        GlobalBatches(reader, global_batch=4, rank=0, world_size=1, micro_batch=4).load_state_dict({"position": 3})


@pytest.mark.parametrize("decoded", [True, False])
def test_kept_batches_are_never_overwritten(reader: ClipReader, decoded: bool) -> None:
    batches = GlobalBatches(reader, global_batch=3, rank=0, world_size=1, micro_batch=3, decoded=decoded)
    kept = [next(batches) for _ in range(20)]
    for step in kept:
        (batch,) = step.micro
        alone = reader.read(np.array([reader.keys.index(key) for key in batch.keys]))
        assert batch.features.dtype == (torch.float32 if decoded else torch.float16)
        assert torch.equal(batch.features, alone.to("cpu").features if decoded else alone.features)
    overflows = batches.stats().ring_overflows
    assert overflows >= 20 - 1 - reader.config.reader.batches
    del kept, step, batch
    for _ in range(5):
        next(batches)
    assert batches.stats().ring_overflows == overflows
    batches.close()


def test_reading_needs_no_new_memory_while_batches_are_let_go(reader: ClipReader) -> None:
    batches = GlobalBatches(reader, global_batch=3, rank=0, world_size=1, micro_batch=2)
    before = batches.stats().ring_overflows
    addresses = set()
    for _ in range(40):
        step = next(batches)
        addresses |= {batch.features.data_ptr() for batch in step.micro}
        del step
    assert batches.stats().ring_overflows == before
    assert len(addresses) <= 2 + 2 + reader.config.reader.batches
    batches.close()


def test_windows_of_long_clips_are_their_frames(tmp_path: Path) -> None:
    write_dataset(tmp_path, clips=4, partitions=("base",), lengths=(9, 3, 7, 5), state_dim=2, extrinsics_dim=1)
    whole, cut = _open(tmp_path), _open(tmp_path, window={"frames": 4, "stride": 2})
    assert cut.num_clips == 3 + 0 + 2 + 1
    assert cut.frames == 4
    for step in _steps(cut, 6, global_batch=2, micro_batch=2):
        for row, key in enumerate(step.micro[0].keys):
            name, _, start = key.partition("@")
            first, batch = int(start), step.micro[0]
            clip = whole.clip(whole.keys.index(name))
            assert torch.equal(batch.features[row], clip.decoded()[first : first + 4])
            assert torch.equal(batch.actions[row], clip.actions[first : first + 3])
            assert clip.states is not None
            assert batch.states is not None
            assert torch.equal(batch.states[row], clip.states[first : first + 4])


def test_a_mixture_draws_its_shares(dataset: Path) -> None:
    parts = [{"view": ["base"], "weight": 0.7}, {"view": ["ice"], "weight": 0.3, "clips": 2}]
    reader = _open(dataset, mixture=parts, mixture_block=10)
    steps = _steps(reader, 6, global_batch=10, micro_batch=5)
    replayed = set()
    for step in steps:
        partitions = [name for batch in step.micro for name in batch.partitions]
        assert sorted(partitions) == ["base"] * 7 + ["ice"] * 3
        replayed |= {key for batch in step.micro for key in batch.keys if key.startswith("ice")}
    assert len(replayed) == 2


def test_an_impossible_share_of_a_step_is_refused(reader: ClipReader) -> None:
    with pytest.raises(ValueError, match="without a clip"):
        GlobalBatches(reader, global_batch=2, rank=0, world_size=3, micro_batch=1)


def test_stats_say_where_the_run_is(dataset: Path) -> None:
    reader = _open(dataset)
    batches = GlobalBatches(reader, global_batch=5, rank=0, world_size=1, micro_batch=5)
    for _ in range(4):
        next(batches)
    stats = batches.stats()
    assert (stats.epoch, stats.position) == (1, 20)
    assert stats.clips_read >= 20
    assert stats.read_seconds > stats.checksum_seconds > 0
    assert stats.wait_seconds > 0
    batches.close()


def test_without_checksums_none_is_computed(dataset: Path) -> None:
    reader = _open(dataset, reader=ReaderConfig(checksums=False).model_dump())
    _steps(reader, 2, global_batch=5, micro_batch=5)
    assert reader.stats().checksum_errors == 0
    assert reader.fields.check is False


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float8_e4m3fn", "float32"])
@pytest.mark.parametrize("config", [{}, {"frames": 3}, {"window": {"frames": 4, "stride": 2}}])
def test_every_stored_type_is_decoded_as_a_single_clip_is(tmp_path: Path, dtype: Any, config: dict[str, Any]) -> None:
    write_dataset(tmp_path, clips=5, lengths=(4, 6, 9), dtype=dtype)
    reader = _open(tmp_path, **config)
    for step in _steps(reader, 6, global_batch=4, micro_batch=3):
        for batch in step.micro:
            alone = reader.read(np.array([reader.keys.index(key) for key in batch.keys])).to("cpu")
            assert torch.equal(batch.features, alone.features)
            assert torch.equal(batch.actions, alone.actions)


@pytest.mark.parametrize(
    "config",
    [
        {"order": "windowed", "order_shards": 2},
        {"window": {"frames": 3}},
        {"tail": "drop"},
        {"tail": "pad_zero_weight"},
        {
            "mixture": [{"view": ["base"], "weight": 2.0}, {"view": ["ice"], "weight": 1.0, "clips": 3}],
            "mixture_block": 6,
        },
    ],
)
def test_every_order_goes_on_exactly(dataset: Path, config: dict[str, Any]) -> None:
    reader = _open(dataset, **config)
    whole = [_real(step.micro) for step in _steps(reader, 9, global_batch=4, micro_batch=4)]
    for done in (1, 4, 7):
        first = GlobalBatches(reader, global_batch=4, rank=0, world_size=1, micro_batch=2)
        for _ in range(done):
            next(first)
        again = GlobalBatches(_open(dataset, **config), global_batch=4, rank=0, world_size=1, micro_batch=3)
        again.load_state_dict(first.state_dict())
        assert [_real(next(again).micro) for _ in range(9 - done)] == whole[done:]
        first.close()
        again.close()


def test_the_windowed_order_is_known_by_its_shards(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, clips=7, heldout=7, lengths=(4, 5, 5), state_dim=3, extrinsics_dim=2, clips_per_shard=3)
    one, other = (_open(folder, order="windowed") for folder in (dataset, tmp_path))
    assert one.fingerprint() != other.fingerprint()
    state = GlobalBatches(one, global_batch=4, rank=0, world_size=1, micro_batch=4).state_dict()
    with pytest.raises(DataError, match="clips in other shards"):
        GlobalBatches(other, global_batch=4, rank=0, world_size=1, micro_batch=4).load_state_dict(state)
    full = GlobalBatches(_open(tmp_path), global_batch=4, rank=0, world_size=1, micro_batch=4)
    full.load_state_dict(
        GlobalBatches(_open(dataset), global_batch=4, rank=0, world_size=1, micro_batch=4).state_dict()
    )


@pytest.mark.parametrize("alignment", ["pair-mean", "difference"])
def test_an_alignment_that_the_recorded_rows_do_not_suit_is_refused(dataset: Path, alignment: str) -> None:
    with pytest.raises(DataError, match=rf"data\.action_alignment={alignment}: clip .* rows of actions"):
        _open(dataset, action_alignment=alignment)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"select": {"keys": "base*"}}, r"data\.mixture\.1\.view=\['ice'\].*leave no training clip"),
        ({}, r"data\.mixture\.1\.clips=9.*only 7 clips"),
    ],
)
def test_a_part_without_enough_clips_is_refused(dataset: Path, config: dict[str, Any], named: str) -> None:
    parts = [{"view": ["base"], "weight": 1.0}, {"view": ["ice"], "weight": 1.0, "clips": 9}]
    with pytest.raises(DataError, match=named):
        _open(dataset, mixture=parts, **config)


def test_a_read_that_hangs_ends_the_run_in_time(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _open(dataset, reader={"timeout": 0.3, "threads": 2})
    release, real = threading.Event(), reader.store.open

    def hanging(shard: int) -> int:
        release.wait(20)
        return real(shard)

    monkeypatch.setattr(reader.store, "open", hanging)
    batches = GlobalBatches(reader, global_batch=4, rank=0, world_size=1, micro_batch=4)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"data\.reader\.timeout=0\.3: no batch came"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert not release.is_set()
    assert time.monotonic() - started < 15
    release.set()


def test_batches_that_are_dropped_end_their_threads(dataset: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    batches = GlobalBatches(_open(dataset), global_batch=4, rank=0, world_size=1, micro_batch=4)
    kept = next(batches)
    expected = kept.micro[0].features.clone()
    del batches
    gc.collect()
    assert {thread.name for thread in threading.enumerate()} <= before
    assert torch.equal(kept.micro[0].features, expected)


def test_reading_threads_leave_the_number_of_torchs_threads_alone(dataset: Path) -> None:
    number = torch.get_num_threads()
    found: list[int] = []
    batches = GlobalBatches(_open(dataset), global_batch=4, rank=0, world_size=1, micro_batch=4)
    next(batches)
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [number]
    assert torch.get_num_threads() == number
    batches.close()
