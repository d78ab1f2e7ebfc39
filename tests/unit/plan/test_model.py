from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner, Result

from hopescale.cli import app
from hopescale.config.compose import load_config
from hopescale.model.flops import flops_executed, flops_reference
from hopescale.plan.model import plan_model

SMALL = ["experiment=demo", "model.width=48", "model.block_pattern=[S,H]"]


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result


def test_phase_5_has_its_published_number_of_parameters() -> None:
    lines = run("experiment=phase5").stdout.splitlines()
    assert lines[0] == "43,554,280 parameters"
    groups = [line.split()[0] for line in lines if " adamw " in line]
    assert groups == ["titan", "cms", "projections", "embeddings", "vectors"]
    assert "One clip: 8 frames of 258 tokens; CMS levels touch 7, 3, 1 of 7 frames" in lines
    assert any(line.startswith("  reference ") for line in lines)
    assert any(line.startswith("  executed ") for line in lines)


def test_two_billion_parameters_are_planned_without_being_built() -> None:
    plan = json.loads(run("experiment=hope_2b", "--json").stdout)
    assert plan["parameters"] == sum(group["parameters"] for group in plan["groups"]) == 2_103_882_304
    assert plan["bytes"]["parameters"] == 4 * 2_103_882_304
    assert plan["bytes"]["total"] == sum(plan["bytes"][name] for name in ("parameters", "gradients", "optimizer_state"))


def test_json_is_one_object_with_the_figures_of_a_clip() -> None:
    config = load_config(SMALL)
    stdout = run(*SMALL, "--json").stdout
    assert len(stdout.splitlines()) == 1
    plan = json.loads(stdout)
    assert plan.pop("newton_schulz")["total"]["matrices"] > 0
    assert plan.pop("job")["ranks"] == {"nodes": 1, "of_node": 1, "replicate": 1, "shard": 1}
    assert plan == plan_model(config)
    objective = config.objective
    assert plan["flops_executed"]["total"] == flops_executed(config.model, objective, 8, "block").total
    assert plan["flops_reference"]["forward"] == flops_reference(config.model, objective, 8).forward
    assert plan["bytes_per_clip"]["together"] > plan["bytes_per_clip"]["block_input"] == 7 * 65 * 48 * 4
    assert plan["branches"] == ["teacher", "jump"]
    assert plan["curriculum"] == []


def test_optimizer_state_is_that_of_the_algorithm() -> None:
    plan = plan_model(load_config([*SMALL, "optimizer=m3_k2", "optimizer.groups.titan.period=4"]))
    # M3 with two levels keeps two momenta and a buffer; AdamW two moments; a slow group the sum that waits.
    numbers = {"m3": 3, "adamw": 2}
    for group in plan["groups"]:
        each = numbers[group["algorithm"]] + (group["name"] == "titan")
        assert group["optimizer_state_bytes"] == 4 * each * group["parameters"], group["name"]
    assert {group["algorithm"] for group in plan["groups"]} == set(numbers)


def test_what_waits_in_host_memory_is_not_counted_as_the_devices() -> None:
    levels = "optimizer.levels=[{period: 1},{period: 4},{period: 16}]"
    settings = [*SMALL, levels, "optimizer.buffers=cascaded"]
    resident, offloaded = (
        plan_model(load_config([*settings, f"optimizer.slow_levels={where}"])) for where in ("resident", "offloaded")
    )
    assert resident["bytes"]["host_state"] == 0
    for group, other in zip(resident["groups"], offloaded["groups"], strict=True):
        if group["algorithm"] == "m3":
            # Three momenta and two buffers; offloaded, a momentum, a buffer and the slow sum stay.
            numbers = 4 * group["parameters"]
            assert (group["optimizer_state_bytes"], group["host_state_bytes"]) == (5 * numbers, 0)
            assert (other["optimizer_state_bytes"], other["host_state_bytes"]) == (3 * numbers, 3 * numbers)
        else:
            assert group == other
    assert offloaded["bytes"]["host_state"] == sum(group["host_state_bytes"] for group in offloaded["groups"])
    assert offloaded["bytes"]["total"] < resident["bytes"]["total"]
    assert "on the host" in run(*settings, "optimizer.slow_levels=offloaded").stdout
    assert "on the host" not in run(*settings).stdout


def test_clips_are_as_long_as_the_data_is_read() -> None:
    whole, short = (plan_model(load_config([*SMALL, *more])) for more in ([], ["data.frames=5"]))
    assert (whole["clip"]["frames"], short["clip"]["frames"]) == (8, 5)
    assert short["clip"]["cms_active_frames"] == [4, 2]
    assert short["flops_executed"]["total"] < whole["flops_executed"]["total"]


def test_each_phase_of_a_curriculum_has_its_figures() -> None:
    curriculum = "objective.curriculum=[{start: 5, rollout_weight: 0.5, rollout_steps: 4}]"
    plan = plan_model(load_config([*SMALL, curriculum]))
    (phase,) = plan["curriculum"]
    assert phase["branches"] == ["teacher", "jump", "rollout"]
    assert phase["flops_executed"]["total"] > plan["flops_executed"]["total"]
    assert "teacher + jump + rollout, from phase 1 of the curriculum on" in run(*SMALL, curriculum).stdout


@pytest.mark.parametrize("recompute", ["none", "chunk", "block"])
def test_recomputation_trades_flops_for_bytes(recompute: str) -> None:
    none, other = (plan_model(load_config([*SMALL, f"parallel.recompute={r}"])) for r in ("none", recompute))
    assert (other["flops_executed"]["recomputed"] > 0) == (recompute != "none")
    assert (other["bytes_per_clip"]["together"] < none["bytes_per_clip"]["together"]) == (recompute != "none")
    assert other["flops_reference"] == none["flops_reference"]


def test_the_compatibility_mode_is_compared_by_what_it_differentiates() -> None:
    present = [
        "model=phase5",
        "model.extrinsics_dim=0",
        "model.memory.detach_interval=2",
        "model.memory.detach_rule=all",
    ]
    found, first_order, full = (
        plan_model(load_config(settings))["flops_reference"]
        for settings in (
            ["model=ac_hope", "model.state_dim=2"],
            [*present, "model.memory.meta_grad=fo"],
            present,
        )
    )
    assert found == first_order
    assert found["backward"] < 0.8 * full["backward"]


def test_what_the_compatibility_mode_executes_is_not_claimed() -> None:
    plan = plan_model(load_config(["model=ac_hope"]))
    assert plan["flops_executed"] is None
    assert plan["bytes_per_clip"] is None
    assert "executed" not in run("model=ac_hope").stdout
