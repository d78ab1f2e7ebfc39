from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hopescale.optim.shard_map import Box, Layout, Team, flat_ranges, layout_of, sharded, team_of, whole

SHAPES = st.builds(
    lambda leading, rows, columns: (*leading, rows, columns),
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(1, 9),
    st.integers(1, 9),
)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """A shape and (dim, parts) of up to two axes of a mesh, which may cut the same dim."""
    shape = draw(SHAPES)
    axes = draw(st.lists(st.tuples(st.integers(0, len(shape) - 1), st.integers(1, 5)), max_size=2))
    return shape, axes


@st.composite
def ranges_of_numbers(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int, int]]]:
    """A shape and ranges (start, stop, offset) that cut its numbers anywhere, some of them empty."""
    shape = draw(SHAPES)
    numel = math.prod(shape)
    inner = draw(st.lists(st.integers(0, numel), max_size=5))
    points = [0, *sorted(inner), numel]
    return shape, [(*bounds, draw(st.integers(0, 7))) for bounds in pairwise(points)]


def chunked(x: Tensor, axes: list[tuple[int, int]]) -> list[Tensor]:
    """Flat local tensors of all slots, cut by torch.chunk axis by axis."""
    parts = [x]
    for dim, count in axes:
        parts = [part for outer in parts for part in _chunks(outer, dim, count)]
    return [part.flatten() for part in parts]


def _chunks(x: Tensor, dim: int, count: int) -> list[Tensor]:
    found = list(torch.chunk(x, count, dim)) if x.numel() else []
    return found + [x.narrow(dim, 0, 0)] * (count - len(found))


def read(flat: Tensor, box: Box) -> Tensor:
    return flat[box.offset : box.offset + box.numel].view(box.bottom - box.top, box.right - box.left)


def check_every_number_once(layout: Layout, x: Tensor, locals_: list[Tensor], offsets: list[int]) -> None:
    """Every number of `x` in one piece, and what a slot's pieces say lies where: contiguous from an offset on."""
    matrices = x.reshape(-1, layout.rows, layout.columns)
    held = torch.zeros_like(matrices)
    assert len(layout.pieces) == len(locals_)
    for slot, (pieces, flat, offset) in enumerate(zip(layout.pieces, locals_, offsets, strict=True)):
        assert len(pieces) == layout.count
        at = offset
        for number, piece in enumerate(pieces):
            for box in piece:
                assert box.numel > 0
                assert box.offset == at
                at += box.numel
                window = (number, slice(box.top, box.bottom), slice(box.left, box.right))
                assert torch.equal(read(flat, box), matrices[window])
                held[window] += 1
            assert layout.sizes[slot][number] == sum(box.numel for box in piece)
    assert torch.equal(held, torch.ones_like(held))


@settings(max_examples=200, deadline=None)
@given(cuts())
def test_pieces_of_cut_dims_are_the_chunks_of_the_tensor(cut: tuple[tuple[int, ...], list[tuple[int, int]]]) -> None:
    shape, axes = cut
    x = torch.arange(math.prod(shape)).reshape(shape)
    layout, locals_ = sharded("w", shape, axes), chunked(x, axes)
    check_every_number_once(layout, x, locals_, [0] * len(locals_))
    assert [sum(sizes) for sizes in layout.sizes] == [part.numel() for part in locals_]
    assert all(len(piece) <= 1 for pieces in layout.pieces for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(ranges_of_numbers())
def test_pieces_of_flat_ranges_put_the_matrices_together(
    cut: tuple[tuple[int, ...], list[tuple[int, int, int]]],
) -> None:
    shape, ranges = cut
    x = torch.arange(math.prod(shape)).reshape(shape)
    # What lies before the offset and after the range belongs to someone else.
    locals_ = [
        torch.cat([torch.full((offset,), -1), x.flatten()[start:stop], torch.full((3,), -1)])
        for start, stop, offset in ranges
    ]
    layout = flat_ranges("w", shape, ranges)
    check_every_number_once(layout, x, locals_, [offset for _, _, offset in ranges])
    assert all(len(piece) <= 3 for pieces in layout.pieces for piece in pieces)


@settings(max_examples=50, deadline=None)
@given(ranges_of_numbers(), st.data())
def test_gaps_and_overlaps_of_ranges_are_refused(
    cut: tuple[tuple[int, ...], list[tuple[int, int, int]]], data: st.DataObject
) -> None:
    shape, ranges = cut
    number = data.draw(st.sampled_from([n for n, (start, stop, _) in enumerate(ranges) if stop > start]))
    start, stop, offset = ranges[number]
    wrong = data.draw(st.sampled_from([(start + 1, stop), (start, stop - 1), (start, stop + 1), (start - 1, stop)]))
    ranges[number] = (*wrong, offset)
    with pytest.raises(ValueError, match=r"parameter w of \d+ numbers .* gaps or overlaps"):
        flat_ranges("w", shape, ranges)


def test_a_range_cuts_a_matrix_into_the_end_of_a_row_whole_rows_and_the_start_of_a_row() -> None:
    layout = flat_ranges("w", (2, 4, 5), [(0, 3, 0), (3, 38, 10), (38, 40, 0)])
    assert layout.pieces[1] == (
        (Box(10, 0, 1, 3, 5), Box(12, 1, 4, 0, 5)),
        (Box(27, 0, 3, 0, 5), Box(42, 3, 4, 0, 3)),
    )


def test_a_range_inside_one_row_is_one_box() -> None:
    layout = flat_ranges("w", (2, 5), [(0, 1, 0), (1, 4, 0), (4, 10, 0)])
    assert [slot[0] for slot in layout.pieces[:2]] == [(Box(0, 0, 1, 0, 1),), (Box(0, 0, 1, 1, 4),)]


def test_more_parts_than_rows_leave_slots_empty() -> None:
    layout = sharded("w", (18, 5), [(0, 8)])
    assert [sizes[0] for sizes in layout.sizes] == [15] * 6 + [0, 0]


@settings(max_examples=100, deadline=None)
@given(cuts())
def test_matrices_are_whole_where_only_leading_dims_are_cut(cut: tuple[tuple[int, ...], list[tuple[int, int]]]) -> None:
    shape, axes = cut
    layout = sharded("w", shape, axes)
    counts = [sum(1 for slot in layout.pieces if slot[number]) for number in range(layout.count)]
    assert layout.is_whole == all(count == 1 for count in counts)
    if all(dim < len(shape) - 2 for dim, _ in axes):
        assert layout.is_whole


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(cuts().map(lambda cut: sharded("w", *cut)), ranges_of_numbers().map(lambda cut: flat_ranges("w", *cut)))
)
def test_where_a_side_is_cut_gram_matrices_of_pieces_add_up(layout: Layout) -> None:
    side = layout.cut_side
    if side is None:
        return
    assert {"rows": layout.rows, "columns": layout.columns}[side] == max(layout.rows, layout.columns)
    x = torch.randn(layout.count, layout.rows, layout.columns, generator=torch.Generator().manual_seed(0)).double()
    for number, matrix in enumerate(x):
        grams = []
        for box in (box for slot in layout.pieces for box in slot[number]):
            piece = matrix[box.top : box.bottom, box.left : box.right]
            grams.append(piece.mT @ piece if side == "rows" else piece @ piece.mT)
        torch.testing.assert_close(
            torch.stack(grams).sum(0), matrix.mT @ matrix if side == "rows" else matrix @ matrix.mT
        )


@pytest.mark.parametrize(
    ("layout", "side"),
    [
        (sharded("w", (12, 4), [(0, 3)]), "rows"),
        (sharded("w", (4, 12), [(1, 3)]), "columns"),
        (sharded("w", (12, 4), [(1, 2)]), None),
        (sharded("w", (4, 12), [(0, 2)]), None),
        (sharded("w", (12, 4), [(0, 2), (0, 3)]), "rows"),
        (sharded("w", (12, 4), [(0, 2), (1, 2)]), None),
        (sharded("w", (6, 6), [(0, 2)]), "rows"),
        (sharded("w", (6, 6), [(1, 2)]), "columns"),
        (sharded("w", (3, 12, 4), [(0, 2), (1, 3)]), "rows"),
        (sharded("w", (18, 5), [(0, 8)]), "rows"),
        (flat_ranges("w", (12, 4), [(0, 20, 0), (20, 48, 0)]), "rows"),
        (flat_ranges("w", (12, 4), [(0, 21, 0), (21, 48, 0)]), None),
        (flat_ranges("w", (4, 12), [(0, 24, 0), (24, 48, 0)]), None),
        (whole("w", (12, 4)), "rows"),
        (whole("w", (4, 12)), "columns"),
    ],
)
def test_the_side_that_is_cut_is_the_longer_one_alone_or_none(layout: Layout, side: str | None) -> None:
    assert layout.cut_side == side


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 6), copies=st.integers(1, 4))
def test_a_team_has_one_rank_at_every_replica_and_slot(size: int, copies: int) -> None:
    team = Team.of_shards(size, copies)
    assert (team.size, team.num_slots, team.num_replicas) == (size * copies, size, copies)
    for replica, slot in product(range(copies), range(size)):
        rank = team.rank[replica, slot]
        assert (team.replicas[rank], team.slots[rank]) == (replica, slot)
    # Slots vary fastest: a replica's ranks are neighbours.
    assert team.slots[:size] == tuple(range(size))


def test_teams_of_one_and_of_copies() -> None:
    assert (Team.of_one().size, Team.of_one().num_slots, Team.of_one().num_replicas) == (1, 1, 1)
    copies = Team.of_copies(3)
    assert (copies.size, copies.num_slots, copies.num_replicas) == (3, 1, 3)
    assert Team.of_copies(1) == Team.of_one() == Team.of_shards(1)


def test_a_plain_tensor_is_whole() -> None:
    layout = layout_of("w", torch.empty(2, 3, 4))
    assert layout == whole("w", (2, 3, 4))
    assert (layout.rows, layout.columns, layout.count, layout.is_whole) == (3, 4, 2, True)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """Rank 0 of eight that never speak to each other: enough for meshes and placements."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_tensor_lies_as_its_placements_say() -> None:
    x, mesh = torch.empty(2, 6, 4), init_device_mesh("cpu", (1, 1))
    for placements in ([Shard(0), Shard(-1)], [Replicate(), Shard(1)], [Replicate(), Replicate()]):
        parameter = DTensor.from_local(x, mesh, placements)
        axes = [(placement.dim % 3, 1) for placement in placements if isinstance(placement, Shard)]
        assert layout_of("w", parameter) == sharded("w", (2, 6, 4), axes)
        assert team_of(parameter, [0]) == Team.of_one()


TWO_BY_FOUR: list[tuple[list[Placement], list[int], list[int]]] = [
    # Placements -> slot and replica of each rank.
    ([Replicate(), Shard(0)], [0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 0, 0, 1, 1, 1, 1]),
    ([Shard(1), Replicate()], [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3]),
    ([Shard(0), Shard(0)], list(range(8)), [0] * 8),
    ([Replicate(), Replicate()], [0] * 8, list(range(8))),
]


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize(("placements", "slots", "replicas"), TWO_BY_FOUR)
def test_a_slot_is_a_place_on_the_axes_that_shard_and_a_replica_one_on_the_others(
    placements: list[Placement], slots: list[int], replicas: list[int]
) -> None:
    mesh = init_device_mesh("cpu", (2, 4))
    parameter = DTensor.from_local(torch.empty(3, 3), mesh, placements)
    assert team_of(parameter, range(8)) == Team(tuple(slots), tuple(replicas))
    # The group may list the ranks of the mesh in another order; a team follows the group.
    order = [5, 0, 7, 2, 1, 4, 3, 6]
    assert team_of(parameter, order) == Team(tuple(slots[r] for r in order), tuple(replicas[r] for r in order))


@pytest.mark.usefixtures("eight_ranks")
def test_the_first_rank_holds_what_the_first_slot_says() -> None:
    mesh, x = init_device_mesh("cpu", (2, 4)), torch.arange(5.0 * 18 * 7).reshape(5, 18, 7)
    for placements in ([Replicate(), Shard(1)], [Shard(0), Shard(2)], [Shard(1), Shard(1)], [Shard(2), Replicate()]):
        parameter = distribute_tensor(x, mesh, placements, src_data_rank=None)
        layout = layout_of("w", parameter)
        flat = parameter.to_local().flatten()
        assert sum(layout.sizes[0]) == flat.numel()
        for number, piece in enumerate(layout.pieces[0]):
            for box in piece:
                assert torch.equal(read(flat, box), x[number, box.top : box.bottom, box.left : box.right])


@pytest.mark.usefixtures("one_rank")
def test_other_placements_and_other_ranks_are_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ValueError, match=r"parameter w has placement P.*M3 takes Shard and Replicate"):
        layout_of("w", DTensor.from_local(torch.empty(6, 4), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"lie on ranks \[0\], but M3's process group is of ranks \[0, 1\]"):
        team_of(DTensor.from_local(torch.empty(6, 4), mesh, [Shard(0)]), [0, 1])
