from __future__ import annotations

import pytest

from hopescale.optim.planner import CPU, Schedule, make_schedule
from hopescale.optim.schedule_table import bucket_figures, figures_of, schedule_table
from hopescale.optim.schema import NewtonSchulzConfig, PlanConfig
from hopescale.optim.shard_map import Team, sharded


def schedule(copies: int = 1) -> Schedule:
    """Two buckets by their owners, of matrices cut in two."""
    layouts = [sharded(f"w{n}", shape, [(0, 2)]) for n, shape in enumerate([(3, 8, 4), (16, 8), (8, 16)])]
    plan = PlanConfig(strategy="owner", bucket_mib=500 / 2**20)
    return make_schedule(layouts, range(3), Team.of_shards(2, copies), NewtonSchulzConfig(precision="fp32"), plan, CPU)


def test_figures_are_those_of_the_busiest_rank_over_the_buckets_asked_for() -> None:
    made = schedule()
    assert len(made.buckets) == 3
    every = figures_of(made)
    assert (every["matrices"], every["exchanges"]) == (5, 6)
    loads = [sum(done[rank] for done in made.flops) for rank in range(2)]
    assert (every["flops"], every["flops_of_all_ranks"]) == (max(loads), sum(loads))
    sent = [sum(s.total[rank] for traffic in made.traffic for s in traffic) for rank in range(2)]
    assert every["bytes_sent"] == max(sent)
    assert every["seconds"] == made.seconds()
    rows = bucket_figures(made)
    for name in ("matrices", "exchanges", "flops_of_all_ranks"):
        assert sum(row[name] for row in rows) == every[name]
    assert [row["shapes"] for row in rows] == [{"8x4": 3}, {"16x8": 1}, {"8x16": 1}]
    assert rows[1] == {"plan": "owner", "shapes": {"16x8": 1}, **figures_of(made, [1])}


@pytest.mark.parametrize("copies", [1, 2])
def test_the_table_has_a_line_for_each_bucket_and_one_for_all(copies: int) -> None:
    made = schedule(copies)
    head, columns, *lines = schedule_table(made).splitlines()
    assert "of 5 matrices on " + ("2 ranks" if copies == 1 else "2 x 2 ranks") in head
    assert "fp32" in head
    assert columns.split() == ["plan", "matrices", "exchanges", "FLOPs", "sent", "time", "shapes"]
    assert [line.split()[0] for line in lines] == ["owner"] * 3 + ["together"]
    assert [line.split("  ")[-1].strip() for line in lines[:3]] == ["3 of 8x4", "1 of 16x8", "1 of 8x16"]
    assert int(lines[-1].split()[1]) == 5
