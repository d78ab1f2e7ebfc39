"""The machines of a run, as configured and as started."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hopescale.config.compose import load_config
from hopescale.errors import ConfigError
from hopescale.plan.schema import ClusterConfig

FEW = st.integers(1, 6)


@pytest.mark.parametrize(
    ("cluster", "ranks"),
    [({}, 1), ({"nodes": 3}, 3), ({"gpus_per_node": 8}, 8), ({"nodes": 3, "gpus_per_node": 8}, 24)],
)
def test_a_job_is_planned_for_one_of_what_is_left_out(cluster: dict[str, Any], ranks: int) -> None:
    assert ClusterConfig(**cluster).ranks == ranks


@pytest.mark.parametrize("cluster", [{}, {"nodes": 2}, {"gpus_per_node": 4}, {"nodes": 2, "gpus_per_node": 4}])
def test_a_launch_on_the_machines_that_were_named_differs_in_nothing(cluster: dict[str, Any]) -> None:
    assert list(ClusterConfig(**cluster).started_differently(8, 4)) == []


def test_a_launch_with_other_ranks_on_a_node_names_both_numbers() -> None:
    (problem,) = ClusterConfig(nodes=2, gpus_per_node=4).started_differently(4, 2)
    assert (problem.field, problem.value) == ("cluster.gpus_per_node", 4)
    assert problem.rule == "2 ranks were started on this node"
    assert "leave it out" in problem.fix


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (4, "4 ranks were started, 4 on this node, which is 1 nodes"),
        (6, "6 ranks were started, 4 on this node, which is 1.5 nodes"),
    ],
)
@pytest.mark.parametrize("cluster", [{"nodes": 2}, {"nodes": 2, "gpus_per_node": 4}])
def test_a_launch_on_other_nodes_says_how_many_they_are(cluster: dict[str, Any], world_size: int, words: str) -> None:
    (problem,) = ClusterConfig(**cluster).started_differently(world_size, 4)
    assert (problem.field, problem.value, problem.rule) == ("cluster.nodes", 2, words)


@given(nodes=FEW, of_node=FEW, world_size=st.integers(1, 36), ranks_of_node=FEW)
def test_one_launch_alone_fits_nodes_and_their_ranks(
    nodes: int, of_node: int, world_size: int, ranks_of_node: int
) -> None:
    cluster = ClusterConfig(nodes=nodes, gpus_per_node=of_node)
    problems = list(cluster.started_differently(world_size, ranks_of_node))
    assert (not problems) == ((world_size, ranks_of_node) == (nodes * of_node, of_node))
    assert list(cluster.started_differently(nodes * of_node, of_node)) == []


@pytest.mark.parametrize("setting", ["cluster.nodes=0", "cluster.gpus_per_node=-1", "cluster.nodes=1.5"])
def test_machines_are_whole_and_there_is_at_least_one(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["experiment=demo", setting])
    assert [problem.field for problem in caught.value.problems] == [setting.partition("=")[0]]
