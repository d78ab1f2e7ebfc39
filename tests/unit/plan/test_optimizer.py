"""Newton-Schulz planned for ranks that are not there."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from hopescale.cli import app
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.errors import ConfigError
from hopescale.optim.orthogonaliser import schedule_for, with_plan
from hopescale.optim.planner import PlanName, costs_of
from hopescale.optim.shard_map import Team
from hopescale.plan.optimizer import EXACT_PLANS, check_plan, plan_optimizer
from hopescale.plan.spread import Spread, model_of

SMALL = ["experiment=demo", "model.width=48", "model.block_pattern=[S,H]"]


def over(config: Config, shards: int, copies: int = 1) -> Spread:
    """A model over copies of shards."""
    parallel = config.parallel.model_copy(update={"shard": shards, "replicate": copies})
    return Spread(config.model_copy(update={"parallel": parallel}), model_of(config), shards * copies)


def test_every_matrix_of_the_m3_groups_is_planned_once() -> None:
    config = load_config(["experiment=phase4"])
    figures, _ = plan_optimizer(over(config, 4))
    # Of each of five blocks 6 CMS and 2 projection matrices; the predictor's last one.
    assert sum(bucket["matrices"] for bucket in figures["buckets"]) == figures["total"]["matrices"] == 41
    assert figures["total"]["bytes_sent"] <= sum(bucket["bytes_sent"] for bucket in figures["buckets"])


def test_exact_plans_that_can_be_used_are_compared() -> None:
    figures, text = plan_optimizer(over(load_config([*SMALL, "parallel.device=cpu"]), 2))
    assert set(figures["others"]) == set(EXACT_PLANS)
    assert figures["others"]["owner"]["seconds"] >= figures["total"]["seconds"]
    assert figures["others"]["gather"]["flops_of_all_ranks"] == pytest.approx(
        2 * figures["others"]["owner"]["flops_of_all_ranks"]
    )
    assert "needs every matrix whole" in figures["others"]["local"]
    assert [line for line in text.splitlines() if line.strip().startswith("all local") and "cannot" in line]


def test_copies_share_the_work_where_that_is_faster() -> None:
    quick, slow = (
        load_config(
            ["experiment=phase4", f"optimizer.plan.across_bandwidth={bandwidth}", "optimizer.plan.flops_bf16=1e10"]
        )
        for bandwidth in (1e13, 1e3)
    )
    shared, repeated = (plan_optimizer(over(config, 2, 4))[0]["total"] for config in (quick, slow))
    assert shared["flops_of_all_ranks"] * 4 == pytest.approx(repeated["flops_of_all_ranks"])
    assert shared["flops"] < repeated["flops"] / 3


def test_one_rank_has_nothing_to_send() -> None:
    figures, text = plan_optimizer(over(load_config(SMALL), 1))
    assert [bucket["plan"] for bucket in figures["buckets"]] == ["local"]
    assert (figures["total"]["exchanges"], figures["total"]["bytes_sent"], figures["others"]) == (0, 0, {})
    assert "local" in text


def test_a_configuration_without_m3_says_so() -> None:
    figures, text = plan_optimizer(over(load_config([*SMALL, "optimizer=adamw"]), 8))
    assert figures == {"matrices": 0}
    assert "no group has algorithm m3" in text


def test_layouts_are_those_of_fsdp() -> None:
    config = load_config(SMALL)
    spread = over(config, 4)
    for layout in spread.layouts(spread.m3_parameters):
        longer = "rows" if layout.rows >= layout.columns else "columns"
        assert layout.cut_side in (longer, None if layout.rows != layout.columns else "columns")


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ("[{pattern: 'nothing*', group: titan}]", "names no parameter of this model"),
        ("[{pattern: '*', group: vectors}]", "leaves m3 without a matrix"),
    ],
)
def test_routes_that_do_not_suit_the_model_are_an_error_of_their_field(routes: str, words: str) -> None:
    overrides = [*SMALL, f"optimizer.routes={routes}"]
    with pytest.raises(ConfigError) as caught:
        check_plan(over(load_config(overrides), 1))
    (problem,) = caught.value.problems
    assert problem.field == "optimizer.routes"
    assert words in problem.rule
    result = CliRunner().invoke(app, ["plan", *overrides])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2


@pytest.mark.parametrize(("device", "words"), [("auto", "for CUDA devices"), ("cpu", "for CPUs")])
def test_the_text_says_for_which_devices_it_is(device: str, words: str) -> None:
    figures, text = plan_optimizer(over(load_config([*SMALL, f"parallel.device={device}"]), 2))
    assert words in text.splitlines()[0]
    assert figures["costs"]["device"] == ("cpu" if device == "cpu" else "cuda")


def test_the_steps_of_block_periodic_are_told_apart() -> None:
    periodic = ["optimizer.plan=block_periodic", "optimizer.plan.block_period=5"]
    figures, text = plan_optimizer(over(load_config([*SMALL, *periodic]), 2))
    usual, _ = plan_optimizer(over(load_config(SMALL), 2))
    assert usual["exact_step"] is None
    assert figures["exact_step"] == usual["total"]
    assert figures["total"]["exchanges"] == 0 < figures["exact_step"]["exchanges"]
    assert "of 5 steps 4 are as above" in text
    assert [line for line in text.splitlines() if line.split()[:2] == ["exact", "step"]]


def test_each_plan_is_costed_in_the_precision_it_computes_in() -> None:
    in_bf16 = ["experiment=phase4", "optimizer.newton_schulz.precision=auto"]
    figures, text = plan_optimizer(over(load_config(in_bf16), 2))
    assert figures["precision"] == figures["others"]["owner"]["precision"] == "bf16"
    assert figures["others"]["gram"]["precision"] == "fp32"
    assert [line for line in text.splitlines() if line.startswith("  all gram") and line.endswith("in fp32")]
    slower, _ = plan_optimizer(over(load_config([*in_bf16, "optimizer.plan.flops_bf16=1e12"]), 2))
    assert slower["others"]["owner"]["seconds"] > 2 * figures["others"]["owner"]["seconds"]
    assert slower["others"]["gram"] == figures["others"]["gram"]
    only_bf16, _ = plan_optimizer(over(load_config(["experiment=phase4", "optimizer.newton_schulz.precision=bf16"]), 2))
    assert "computes in fp32" in only_bf16["others"]["gram"]


def test_the_cost_model_can_be_overridden() -> None:
    config = load_config([*SMALL, "optimizer.plan.latency=0.5", "optimizer.plan.flops=1.0e6"])
    costs = costs_of(config.optimizer.plan, "cuda")
    assert (costs.latency, costs.flops) == (0.5, 1e6)
    assert costs.bandwidth == costs_of(load_config(SMALL).optimizer.plan, "cuda").bandwidth


@pytest.mark.parametrize("plan", ["owner", "gram", "gather"])
def test_a_forced_plan_is_taken_for_all_matrices(plan: PlanName) -> None:
    config = load_config(["experiment=phase4"])
    spread, one_plan = over(config, 2), with_plan(config.optimizer, plan)
    layouts = spread.layouts(spread.m3_parameters)
    schedule = schedule_for(layouts, range(len(layouts)), Team.of_shards(2), one_plan, torch.device("cuda"))
    assert {bucket.plan for bucket in schedule.buckets} == {plan}


def test_a_forced_plan_that_cannot_be_used_is_an_error_of_its_field() -> None:
    config = load_config(["experiment=phase4", "optimizer.plan=replicated"])
    check_plan(over(config, 1))
    with pytest.raises(ConfigError) as caught:
        check_plan(over(config, 4))
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("optimizer.plan.strategy", "replicated")
    assert "needs every matrix whole on its rank" in problem.rule
    result = CliRunner().invoke(app, ["plan", "experiment=phase4", "optimizer.plan=replicated", "gpus_per_node=4"])
    assert isinstance(result.exception, ConfigError)


def test_the_command_prints_the_schedule() -> None:
    command = ["plan", "experiment=phase4", "nodes=2", "gpus_per_node=8", "parallel=hsdp"]
    assert "8 x 2 ranks" in CliRunner().invoke(app, [*command, "train.global_batch=16"]).stdout
