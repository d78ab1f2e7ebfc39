from __future__ import annotations

import hashlib
import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.optim import orthogonaliser
from hopescale.optim.newton_schulz import orthogonalise, steps_of
from hopescale.optim.orthogonaliser import Orthogonaliser, agree, orthogonalisers, with_precision
from hopescale.optim.pipeline import take_turns
from hopescale.optim.schema import OptimizerConfig
from hopescale.optim.shard_map import Team, sharded, whole

CPU = torch.device("cpu")


def config(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"newton_schulz": {"precision": "fp32"}} | fields)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_matrices_of_all_shapes_are_orthogonalised_in_place() -> None:
    shapes = [(9, 6), (6, 9), (4, 4), (3, 2, 6, 9)]
    team = Orthogonaliser([whole(f"w{n}", s) for n, s in enumerate(shapes)], Team.of_one(), config(), CPU)
    flat = {n: normal(*shape, seed=n).flatten() for n, shape in enumerate(shapes)}
    take_turns(team.tasks(range(4), flat))
    for number, shape in enumerate(shapes):
        expected = orthogonalise(normal(*shape, seed=number), steps_of("quintic", 5))
        torch.testing.assert_close(flat[number].view(shape), expected, rtol=0, atol=1e-5)


def test_only_the_members_asked_for_are_touched() -> None:
    team = Orthogonaliser([whole(f"w{n}", (5, 3)) for n in range(3)], Team.of_one(), config(), CPU)
    flat = {n: normal(15, seed=n) for n in range(3)}
    for members in ([0, 2], [1], [0, 2], []):
        held = {n: flat[n].clone() for n in range(3)}
        take_turns(team.tasks(members, held))
        assert [n for n in range(3) if not torch.equal(held[n], flat[n])] == sorted(members)


def test_buckets_are_tasks_of_their_own() -> None:
    layouts = [whole(f"w{n}", (5, 3)) for n in range(5)]
    team = Orthogonaliser(layouts, Team.of_one(), config(plan={"bucket_mib": 2 * 60 / 2**20}), CPU)
    assert len(team.tasks(range(5), {n: normal(15) for n in range(5)})) == 3


def test_a_plan_that_cannot_be_used_is_refused_at_construction() -> None:
    cut = [sharded("w", (8, 4), [(1, 2)])]
    with pytest.raises(ValueError, match=r"optimizer\.plan\.strategy=gram .* but w are cut otherwise"):
        Orthogonaliser(cut, Team.of_shards(2), config(plan="gram"), CPU)


def test_block_periodic_warns_and_is_exact_by_another_plan_at_times(caplog: pytest.LogCaptureFixture) -> None:
    settings = config(plan={"strategy": "block_periodic", "block_period": 4})
    with caplog.at_level(logging.WARNING):
        team = Orthogonaliser([sharded("w", (8, 4), [(0, 2)])], Team.of_shards(2), settings, CPU)
    assert "not exact: 3 of 4 steps" in caplog.text
    assert {bucket.plan for bucket in team.schedule([0], exact=False).buckets} == {"block_periodic"}
    assert {bucket.plan for bucket in team.schedule([0], exact=True).buckets} <= {"owner", "gram"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_given_precision_is_kept(precision: str) -> None:
    given = OptimizerConfig.model_validate({"newton_schulz": {"precision": precision}})
    assert with_precision(given, CPU) == with_precision(given, torch.device("cuda")) == given.newton_schulz


def test_auto_takes_bf16_where_the_device_multiplies_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for vectors, tiles, expected in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda vectors=vectors: vectors)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert with_precision(OptimizerConfig(), CPU).precision == expected
        for fields in ({"plan": "gram"}, {"newton_schulz": {"restart": 2}}):
            # bf16 has no use for either.
            assert with_precision(OptimizerConfig.model_validate(fields), CPU).precision == "fp32"


def saying(told: list[str]) -> SimpleNamespace:
    """Stands in for torch.distributed: what the ranks say."""

    def all_gather(everyone: list[Tensor], mine: Tensor, group: Any) -> None:
        for target, text in zip(everyone, told, strict=True):
            target.copy_(torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8))

    return SimpleNamespace(
        all_gather=all_gather,
        get_world_size=lambda _: len(told),
        get_rank=lambda _: 0,
        get_process_group_ranks=lambda _: list(range(len(told))),
    )


def test_ranks_that_say_otherwise_are_named_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    group = cast(dist.ProcessGroup, object())
    monkeypatch.setattr(orthogonaliser, "dist", saying(["one"] * 3))
    agree("one", group, CPU)
    monkeypatch.setattr(orthogonaliser, "dist", saying(["other", "one", "one"]))
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] have another optimizer than rank 0"):
        agree("one", group, CPU)


def test_plain_parameters_without_a_group_are_of_one_rank() -> None:
    named = [("a", nn.Parameter(normal(4, 3))), ("b", nn.Parameter(normal(2, 3, 4)))]
    ((team, places),) = orthogonalisers(named, config(), None)
    assert (team.team, places, team.group) == (Team.of_one(), [0, 1], None)
    assert [layout.name for layout in team.layouts] == ["a", "b"]
    assert orthogonalisers([], config(), None) == []


def test_plain_parameters_with_a_group_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orthogonaliser, "dist", saying(["00"] * 3))
    group = cast(dist.ProcessGroup, object())
    ((team, places),) = orthogonalisers([("a", nn.Parameter(normal(4, 3)))], config(), group)
    assert (team.team, places, team.group) == (Team.of_copies(3), [0], group)
