from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hopescale.metrics
from hopescale.metrics.catalog import CATALOG, OF_THE_RUN, UnknownMetric, by_key, markdown_table
from hopescale.metrics.data_metrics import READER_STATS, SHARDER_STATS
from hopescale.model.schema import MEMORIES

SUFFIX_OF_UNIT = {"seconds": "seconds", "bytes": "bytes", "ratio": "ratio"}


def test_no_metric_is_named_twice_and_no_labelled_number_shadows_another():
    keys = [metric.key for metric in CATALOG]
    assert len(set(keys)) == len(keys)
    for metric in CATALOG:
        if metric.labels not in ((), ("rank",)):
            assert not [key for key in keys if key.startswith(metric.key + "_")], metric.key


@pytest.mark.parametrize("metric", CATALOG, ids=lambda metric: metric.key)
def test_names_follow_the_prometheus_conventions(metric):
    assert re.fullmatch(r"hopescale_[a-z][a-z0-9]*(_[a-z0-9]+)*", metric.name)
    assert metric.name == "hopescale_" + metric.key
    assert (metric.kind == "counter") == metric.key.endswith("_total")
    stem = metric.key.removesuffix("_total")
    for unit, suffix in SUFFIX_OF_UNIT.items():
        assert (metric.unit == unit) == stem.endswith("_" + suffix)
    assert metric.help.endswith(".")
    assert "|" not in metric.help
    assert "\n" not in metric.help


@pytest.mark.parametrize("metric", CATALOG, ids=lambda metric: metric.key)
def test_labels_are_bounded(metric):
    assert (metric.reduction == "rank") == ("rank" in metric.labels)
    of_the_run = [(name,) for name in OF_THE_RUN]
    fixed = (("kind",), ("memory",), ("reason",))
    assert metric.labels in ((), ("rank",), *fixed, *of_the_run) or metric.record == "info"
    assert bool(metric.label_values) == (metric.labels in fixed)
    assert not metric.overall or metric.labels


def test_memories_are_called_as_in_the_model():
    fixed = {metric.label_values for metric in CATALOG if metric.labels == ("memory",)}
    assert fixed == {MEMORIES}


def test_rank_is_a_label_of_step_time_last_step_and_memory_only():
    with_rank = {metric.key for metric in CATALOG if "rank" in metric.labels}
    assert with_rank == {"step_seconds", "last_step_timestamp_seconds", "memory_bytes"}


def test_running_totals_are_counters_and_only_they_are_summed_over_ranks():
    for metric in CATALOG:
        if metric.reduction == "sum":
            assert metric.kind == "counter", metric.key


def test_every_reader_statistic_has_a_metric():
    stats = pytest.importorskip("data_pipeline.stats")
    fields = {field.name for field in dataclasses.fields(stats.ReaderStats)}
    assert fields == set(READER_STATS)
    for key, label in READER_STATS.values():
        metric = by_key(key)
        assert label in (metric.label_values or (None,))
        assert (metric.kind == "counter") == (metric.reduction == "sum")


def test_every_sharder_statistic_has_a_metric():
    stats = pytest.importorskip("data_pipeline.stats")
    assert {field.name for field in dataclasses.fields(stats.SharderStats)} == set(SHARDER_STATS)
    assert {by_key(key).record for key in SHARDER_STATS.values()} == {"shard"}


def test_unknown_key_names_the_nearest_known_one():
    with pytest.raises(UnknownMetric, match="nearest known: 'loss_teacher'"):
        by_key("loss_techer")


def test_readme_holds_exactly_the_generated_table():
    readme = Path(str(hopescale.metrics.__file__)).with_name("README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert "\n".join(rows) + "\n" == markdown_table()


def test_catalog_and_package_import_no_torch():
    code = "import hopescale.metrics.sinks, hopescale.metrics.catalog, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
