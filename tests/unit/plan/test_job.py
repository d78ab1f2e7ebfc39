"""Whole jobs on machines that are not there, and what `hopescale plan` prints of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hopescale.cli import app
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.errors import ConfigError, Problem
from hopescale.parallel.schema import ParallelConfig
from hopescale.plan.hardware import PRESETS
from hopescale.plan.job import Job, by_recompute, figures_of, job_of, planned, sweep_rows
from hopescale.plan.memory import memory_of
from hopescale.plan.schema import ClusterConfig
from hopescale.plan.spread import Model, model_of
from hopescale.plan.step_time import PARTS
from hopescale.plan.text import describe_job, gib, seconds, sweep_table
from hopescale.plan.traffic import Share

SMALL = ("experiment=demo", "model.width=48", "model.block_pattern=[S,H]")
MACHINES = ("nodes=2", "gpus_per_node=2", "hardware=cpu")
CLIP_BYTES = 8 * 64 * 112 * 2
"""Frames, patches and channels of the demo, in fp16."""


@lru_cache
def small(*overrides: str) -> Config:
    return load_config([*SMALL, *overrides])


@lru_cache
def small_model(*overrides: str) -> Model:
    return model_of(small(*overrides))


def job(nodes: int = 1, of_node: int = 1, *overrides: str, batch: int = 16, **parallel: Any) -> Job:
    config = small(*overrides)
    update = {"parallel": ParallelConfig(**parallel), "train": config.train.model_copy(update={"global_batch": batch})}
    config = config.model_copy(update=update)
    return planned(config, small_model(*overrides), nodes * of_node, of_node, PRESETS["cpu"])


def with_memory(given: Job, size: float) -> Job:
    return replace(given, hardware=replace(given.hardware, memory_bytes=size))


def refused(*overrides: str, parallel: ParallelConfig | None = None, **cluster: Any) -> Problem:
    update = {"cluster": ClusterConfig(**cluster)} | ({"parallel": parallel} if parallel else {})
    with pytest.raises(ConfigError) as caught:
        job_of(small(*overrides).model_copy(update=update))
    (problem,) = caught.value.problems
    return problem


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *SMALL, *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def printed_error(*arguments: str) -> Problem:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    (problem,) = result.exception.problems
    return problem


def test_a_job_is_that_of_its_cluster() -> None:
    cluster = ClusterConfig(nodes=2, gpus_per_node=4, hardware="a100")
    found = job_of(small().model_copy(update={"cluster": cluster}))
    assert (found.world_size, found.ranks_of_node, found.hardware.name) == (8, 4, "a100")
    assert (found.share.clips, found.frames, found.model.parameters) == (2, 8, small_model().parameters)
    alone = job_of(small())
    assert (alone.world_size, alone.ranks_of_node, alone.hardware.name) == (1, 1, "h100")


def test_a_batch_that_does_not_reach_every_rank_is_an_error() -> None:
    problem = refused(nodes=2, gpus_per_node=10)
    assert (problem.field, problem.value) == ("train.global_batch", 16)
    assert problem.rule == "must be at least one clip for each of 20 ranks"
    assert "plan for fewer ranks" in problem.fix
    assert job().on(16).share.clips == 1


def test_ranks_that_cannot_be_arranged_are_an_error_of_their_field() -> None:
    problem = refused(parallel=ParallelConfig(shard=4), nodes=3, gpus_per_node=2)
    assert (problem.field, problem.value) == ("parallel.shard", 4)
    assert problem.rule == "must divide the number of ranks, 6"
    assert "1, 2, 3, 6" in problem.fix


def test_unknown_hardware_is_an_error_of_its_field() -> None:
    assert refused(hardware="h1000").field == "cluster.hardware"


def test_clips_shorter_than_the_model_allows_are_planned_as_short() -> None:
    assert job().frames == 8
    assert job(1, 1, "data.frames=5").frames == 5
    assert job(1, 1, "data.frames=5").memory.activations < job().memory.activations


@pytest.mark.parametrize("engine", [{}, {"engine": "ddp"}, {"engine": "deepspeed", "zero_stage": 3}])
def test_more_recomputing_needs_less_memory_and_more_time(engine: dict[str, Any]) -> None:
    none, chunk, block = (job(1, 2, recompute=mode, **engine) for mode in ("none", "chunk", "block"))
    assert none.memory.activations > chunk.memory.activations > block.memory.activations
    assert none.memory.total > chunk.memory.total > block.memory.total
    assert none.time.products < chunk.time.products < block.time.products
    assert none.memory.parameters == block.memory.parameters


def test_what_is_held_is_counted_in_bytes() -> None:
    # 61,072 numbers; AdamW keeps two tensors of 5,760 + 1,056 + 2,032, M3 one of the rest.
    alone, zero = job().memory, job(1, 2, engine="deepspeed", zero_stage=1).memory
    assert (alone.parameters, alone.optimizer, alone.host) == (244_288, 4 * (52_224 + 2 * 8_848), 0)
    # Whole parameters, and a half of fp32 masters.
    assert zero.parameters == 244_288 + 122_144
    assert job(2, 2, engine="ddp").memory.parameters == 244_288


def test_offloaded_state_is_in_host_memory_alone() -> None:
    adamw = "optimizer=adamw"
    kept, moved = (
        job(1, 2, adamw, engine="deepspeed", zero_stage=2, offload_optimizer=offload).memory
        for offload in (False, True)
    )
    half = 61_072 // 2 * 4
    assert (kept.host, kept.optimizer) == (0, 2 * half)
    assert (moved.host, moved.optimizer) == (3 * half, 0)
    assert kept.parameters - moved.parameters == half
    assert "and 357.84 KiB in host memory" in describe_job(
        job(1, 2, adamw, engine="deepspeed", zero_stage=2, offload_optimizer=True)
    )


@pytest.mark.parametrize("parallel", [{}, {"recompute": "none"}, {"engine": "deepspeed", "zero_stage": 3}])
@pytest.mark.parametrize("size", [20e6, 123e6])
def test_the_largest_micro_batch_fits_and_one_clip_more_does_not(parallel: dict[str, Any], size: float) -> None:
    most = with_memory(job(1, 2, **parallel), size).largest_micro_batch
    assert most > 1
    exact, above = (with_memory(job(1, 2, batch=2 * clips, **parallel), size) for clips in (most, most + 1))
    assert exact.share.micro_batch == most
    assert exact.memory.total <= 0.9 * size < above.memory.total
    assert (figures_of(exact)["fits"], figures_of(above)["fits"]) == (True, False)


def test_no_micro_batch_fits_into_next_to_nothing() -> None:
    tiny = with_memory(job(), 1e6)
    assert tiny.largest_micro_batch == 0
    text = describe_job(tiny)
    assert "does NOT fit into 976.56 KiB less 10%" in text
    assert "largest train.micro_batch that fits: 0" in text


def test_one_clip_may_be_all_that_fits() -> None:
    one, two = (job(batch=clips).memory.total for clips in (1, 2))
    assert with_memory(job(batch=1), (one + two) / 2 / 0.9).largest_micro_batch == 1


def test_clips_and_gradients_that_wait_are_counted_below_a_whole_batch() -> None:
    whole = job(batch=64).memory.total
    most = with_memory(job(batch=64), 0.5 * whole).largest_micro_batch
    assert 1 <= most < 64
    exact, above = (
        memory_of(job().spread, job().schedule, Share(64, -(-64 // clips), clips), 8).total
        for clips in (most, most + 1)
    )
    assert exact <= 0.9 * 0.5 * whole < above


def test_the_gram_plan_needs_no_other_rank() -> None:
    text = CliRunner().invoke(app, ["plan", "experiment=demo", "optimizer.plan=gram"]).stdout
    assert "1 ranks cannot" not in text
    assert "Newton-Schulz of" in text


def test_a_plan_that_some_ranks_cannot_take_is_a_row_that_says_so() -> None:
    settings = [*SMALL, "model.encoder_dim=63", "optimizer.plan=gram", "parallel.device=cpu"]
    rows = sweep_rows(job_of(load_config([*settings, "cluster.gpus_per_node=3"])))
    said = {row["ranks"]: row.get("cannot") for row in rows}
    assert said[1] is said[3] is None
    assert "cut the longer side alone" in str(said[2])


def test_a_recompute_mode_that_a_run_refuses_is_not_planned() -> None:
    assert set(by_recompute(job_of(load_config([*SMALL, "model.memory.chunk_rule=scan"])))) == {"none", "block"}


def test_shared_memories_are_planned_on_one_rank_alone() -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(load_config([*SMALL, "model.memory.scope=batch", "cluster.gpus_per_node=2"]))
    assert caught.value.problems[0].field == "model.memory.scope"


def test_a_plot_into_a_folder_that_is_not_there_is_refused_before_planning(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", *SMALL, "--plot", str(tmp_path / "no" / "x.png")])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.problems[0].field == "--plot"


@pytest.mark.parametrize(
    ("fitted", "ranks", "is_extrapolation", "words"),
    [
        (None, 1, True, "no step was measured on them"),
        (2, 4, False, "within reach of the steps of up to 2 ranks"),
        (2, 5, True, "the rates were fitted to steps of up to 2 ranks"),
        (8, 1, False, "within reach of the steps of up to 8 ranks"),
    ],
)
def test_time_is_an_extrapolation_beyond_twice_the_ranks_that_were_measured(
    fitted: int | None, ranks: int, is_extrapolation: bool, words: str
) -> None:
    found = job(1, ranks)
    found = replace(found, hardware=replace(found.hardware, fitted_ranks=fitted))
    assert found.is_extrapolation is is_extrapolation
    last = describe_job(found).splitlines()[-1]
    assert words in last
    assert last.strip().startswith("an extrapolation: ") is is_extrapolation


def test_a_node_reads_the_clips_of_its_ranks() -> None:
    found = job(2, 2)
    assert found.clips_per_second == pytest.approx(16 / found.time.total)
    assert found.read_per_node == pytest.approx(found.clips_per_second * CLIP_BYTES / 2)
    assert job(1, 4).read_per_node == pytest.approx(job(1, 4).clips_per_second * CLIP_BYTES)


def test_another_number_of_ranks_fills_node_after_node() -> None:
    whole = job(2, 4)
    places = [(other.world_size, other.ranks_of_node) for other in (whole.on(ranks) for ranks in (1, 2, 4, 6, 8))]
    assert places == [(1, 1), (2, 2), (4, 4), (6, 4), (8, 4)]
    assert figures_of(whole.on(6))["ranks"] == {"nodes": 2, "of_node": 4, "replicate": 1, "shard": 6}


def test_another_recompute_mode_changes_that_alone() -> None:
    other = job(1, 2).recomputing("none")
    assert other.config.parallel == ParallelConfig(recompute="none")
    assert (other.memory, other.time) == (job(1, 2, recompute="none").memory, job(1, 2, recompute="none").time)


def test_ranks_that_the_batch_does_not_reach_cannot_be_planned_for() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch=16: must be at least one clip for each of 17 ranks"):
        job().on(17)


def test_chunks_are_left_out_where_no_block_has_a_memory() -> None:
    assert list(by_recompute(job())) == ["none", "chunk", "block"]
    attention = job(1, 2, "model.block_pattern=[S,S]")
    assert list(by_recompute(attention)) == ["none", "block"]
    assert [(row["ranks"], row["recompute"]) for row in sweep_rows(attention)] == [
        (1, "none"),
        (1, "block"),
        (2, "none"),
        (2, "block"),
    ]
    assert "chunk" not in describe_job(attention)


def test_a_sweep_doubles_ranks_up_to_the_job() -> None:
    rows = sweep_rows(job(2, 3))
    assert [row["ranks"] for row in rows[::3]] == [1, 2, 4, 6]
    assert {row["recompute"] for row in rows[:3]} == {"none", "chunk", "block"}
    last = {row["recompute"]: row for row in rows[-3:]}
    for mode, row in last.items():
        assert row["memory"] == job(2, 3, recompute=mode).memory.total
        assert row["seconds"] == pytest.approx(job(2, 3, recompute=mode).time.total)
        assert row["clips_per_second"] == pytest.approx(16 / row["seconds"])
    assert last["none"]["largest_micro_batch"] < last["block"]["largest_micro_batch"]


def test_a_row_of_a_sweep_that_cannot_be_says_why() -> None:
    rows = sweep_rows(job(1, 6, shard=3))
    cannot = {row["ranks"]: row.get("cannot") for row in rows}
    assert cannot.pop(6) is None
    assert cannot == {ranks: f"must divide the number of ranks, {ranks}" for ranks in (1, 2, 4)}
    assert {frozenset(row) for row in rows if "cannot" in row} == {frozenset({"ranks", "recompute", "cannot"})}
    lines = sweep_table(rows).splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[1].split()[:3] == ["1", "none", "cannot:"]
    assert " 100%  " in lines[-1]


def test_a_table_compares_clips_a_second_of_a_rank_with_the_first_row_of_its_mode() -> None:
    row = {"recompute": "none", "memory": 2**20, "largest_micro_batch": 3, "seconds": 0.5, "bottleneck": "products"}
    rows = [
        {**row, "ranks": 1, "fits": False, "clips_per_second": 10.0},
        {**row, "ranks": 4, "fits": True, "clips_per_second": 30.0},
        {**row, "ranks": 4, "fits": True, "clips_per_second": 8.0, "recompute": "block"},
    ]
    _, first, second, third = (line.split() for line in sweep_table(rows).splitlines())
    assert first == ["1", "none", "1.00", "MiB", "NO", "3", "500.00", "ms", "10.0", "100%", "products"]
    assert (second[4], second[-2], third[-2]) == ("yes", "75%", "100%")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.50 KiB"), (2**20, "1.00 MiB"), (1500 * 2**30, "1,500.00 GiB")],
)
def test_bytes_are_written_in_binary_units(value: float, text: str) -> None:
    assert gib(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00 ms"), (0.25, "250.00 ms"), (1.0, "1.00 s"), (3600, "3,600.00 s")]
)
def test_seconds_are_written_in_a_fitting_unit(value: float, text: str) -> None:
    assert seconds(value) == text


def test_the_command_prints_memory_traffic_and_time() -> None:
    text = printed(*MACHINES)
    assert "On 2 x 2 cpu: fsdp, 1 copies of 4 shards, 4 clips a rank in 1 of at most 4" in text
    lines = [line.split() for line in text.splitlines() if line]
    modes = {line[0]: line for line in lines if line[0] in ("none", "chunk", "block")}
    assert set(modes) == {"none", "chunk", "block"}
    assert [name for name, line in modes.items() if line[-1] == "parallel.recompute"] == ["block"]
    sent = [(line[0], line[1], line[2]) for line in lines if line[1:2] in (["all_gather"], ["all_to_all"])]
    assert sent == [("parameters", "all_gather", "4"), ("M3", "all_to_all", "4")]
    assert "fits into 3.73 GiB less 10%" in text
    assert "61,072 parameters" in text
    assert "Newton-Schulz of 12 matrices on 4 ranks" in text


def test_one_rank_has_nothing_that_travels() -> None:
    text = printed()
    assert "On 1 x 1 h100: ddp, 1 copies of 1 shards, 16 clips a rank in 1 of at most 16" in text
    assert "Nothing travels between ranks" in text


def test_json_has_the_job_beside_the_model() -> None:
    (line,) = printed(*MACHINES, "train.micro_batch=3", "--json").splitlines()
    figures = json.loads(line)
    found = figures["job"]
    assert (figures["parameters"], figures["newton_schulz"]["total"]["matrices"]) == (61_072, 12)
    assert found["ranks"] == {"nodes": 2, "of_node": 2, "replicate": 1, "shard": 4}
    assert found["share"] == {"clips": 4, "micro_batches": 2, "micro_batch": 2}
    assert (found["engine"], found["hardware"]["name"], found["fits"]) == ("fsdp", "cpu", True)
    assert found["memory"]["none"]["total"] > found["memory"]["chunk"]["total"] > found["memory"]["block"]["total"]
    assert found["seconds"]["total"] == pytest.approx(sum(found["seconds"][name] for name in PARTS))
    assert [each["what"] for each in found["collectives"]] == [*("parameters", "gradients", "norms", "M3", "control")]


def test_a_sweep_is_one_table_or_one_object() -> None:
    sweep = (*MACHINES, "parallel=hsdp", "--sweep")
    lines = printed(*sweep).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [ranks, mode] for ranks in ("1", "2", "4") for mode in ("none", "chunk", "block")
    ]
    rows = json.loads(printed(*sweep, "--json"))["sweep"]
    assert [row["ranks"] for row in rows] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert ["cannot" in row for row in rows] == [True] * 3 + [False] * 6


@pytest.mark.requires("demo")
@pytest.mark.parametrize("overrides", [("--sweep",), ("parallel.shard=2", "model.block_pattern=[S]")])
def test_a_plot_is_a_png_of_the_sweep(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    path = tmp_path / "sweep.png"
    text = printed(*MACHINES, *overrides, "--plot", str(path))
    assert text.splitlines()[0].split()[:2] == ["ranks", "recompute"]
    assert text.splitlines()[-1] == str(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_file_of_measured_figures_says_how_far_they_reach(tmp_path: Path) -> None:
    path = tmp_path / "lab.json"
    path.write_text(json.dumps(asdict(PRESETS["cpu"]) | {"name": "lab", "fitted_ranks": 2}))
    text = printed("gpus_per_node=2", f"hardware={path}")
    assert "On 1 x 2 lab: fsdp" in text
    assert "within reach of the steps of up to 2 ranks that the rates were fitted to" in text


@pytest.mark.parametrize("arguments", [("gpus_per_node=2",), ("nodes=2",), ("--sweep",)])
def test_the_earlier_predictor_is_planned_for_one_rank_alone(arguments: tuple[str, ...]) -> None:
    problem = printed_error("model=ac_hope", *arguments)
    assert (problem.field, problem.value) == ("model.compat", "ac_hope")
    assert "not known here" in problem.rule
    assert "one rank" in problem.fix


def test_the_earlier_predictor_has_figures_of_a_model_without_a_job() -> None:
    result = CliRunner().invoke(app, ["plan", "model=ac_hope", "--json"])
    assert result.exit_code == 0, result.output
    assert "job" not in json.loads(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("gpus_per_node=17",), "train.global_batch"),
        (("gpus_per_node=3", "parallel.shard=2"), "parallel.shard"),
        (("hardware=list",), "cluster.hardware"),
        (("nodes=0",), "cluster.nodes"),
        (("--nodes=2",), "--nodes"),
    ],
)
def test_a_job_that_cannot_be_is_an_error_of_its_setting(arguments: tuple[str, ...], field: str) -> None:
    assert printed_error(*SMALL, *arguments).field == field


def test_many_shards_that_divide_nothing_are_pointed_out_with_a_number_that_does() -> None:
    text = describe_job(job(4, 8, batch=32))
    assert "1.7 times an even share: 32 shards do not divide most parameters" in text
    assert "parallel=fsdp parallel.shard=8 would" in text
    assert "times an even share" not in describe_job(job(1, 8, batch=32))
