"""Real runs under a real Prometheus and a real Alertmanager: every alert fires by its fault and ends with it.

The configuration and the rules are those of `ops/`, with seconds in place of hours.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shard import shard
from tests.feature_folders import write_features
from tests.monitored_run import Clips, MonitoredRun
from tests.monitored_site import RUNBOOKS, Site
from tests.slow_files import SlowFiles

pytestmark = [
    pytest.mark.integration,
    pytest.mark.requires("2ranks", "prometheus", "prometheus-server", "alertmanager", "namespaces", "remote"),
]

SMALL = [
    "model.encoder_dim=16",
    "model.grid=[2,3]",
    "model.frames=5",
    "model.width=24",
    "model.block_pattern=[S]",
    "model.attention.heads=2",
    "objective.jump_horizons=2",
    "train.global_batch=4",
    "train.steps=1000000",
    "metrics.port=0",
    "metrics.tensorboard=false",
    "checkpoint.every=10",
    "checkpoint.keep=2",
]
SAVES = ("HopescaleDiskFilling", "HopescaleCheckpointFailing", "HopescaleCheckpointOld")


def easy(shape: tuple[int, ...]) -> np.ndarray:
    """The same picture all the time: soon predicted well."""
    return np.broadcast_to(np.random.default_rng(1).normal(size=shape[1:]), shape)


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng().normal(size=shape)


def not_a_number(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, np.nan)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitored")
    shard(write_features(folder / "features", per_split=40, lengths=(5,)), folder / "data", clips_per_shard=10)
    return folder / "data"


@pytest.fixture(scope="module")
def far_data(dataset: Path) -> Iterator[SlowFiles]:
    """The same data behind a server whose shards do not come."""
    with SlowFiles(dataset, "shards", bytes_per_second=0) as server:
        yield server


@pytest.fixture(scope="module")
def far_run(site: Site, far_data: SlowFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredRun]:
    """A run on one rank that reads them, of the same name as the other in another cluster; it waits for its first step.

    The node has room for half of the shards, so that they are fetched again and again.
    """
    folder = tmp_path_factory.mktemp("far")
    room = 2 * max(path.stat().st_size for path in (far_data.folder / "shards").iterdir())
    settings = [
        *SMALL,
        f"data.path={far_data.url}",
        "data.allowed_schemes=[http]",
        "data.order=windowed",
        "data.order_shards=1",
        f"data.staging.folder={folder / 'staged'}",
        f"data.staging.max_bytes={room}",
        "metrics.every=1",
        *site.settings("b"),
    ]
    with MonitoredRun(folder / "r", settings, ranks=1) as run:
        yield run


@pytest.fixture(scope="module")
def clips(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Of a copy of the data set for a run that does not check what it reads; all are easy to predict."""
    clips = Clips.of(shutil.copytree(dataset, tmp_path_factory.mktemp("near") / "data"))
    clips.overwrite(easy)
    return clips


@pytest.fixture(scope="module")
def run(
    site: Site, far_run: MonitoredRun, clips: Clips, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MonitoredRun]:
    """A run on two ranks that is well, beside the other one; each test leaves it so."""
    folder = tmp_path_factory.mktemp("run")
    settings = [*SMALL, f"data.path={clips.dataset}", "data.reader.checksums=false", "metrics.every=2"]
    with MonitoredRun(folder / "r", [*settings, *site.settings("a")]) as run:
        run.endpoint()
        site.wait_for('max_over_time(run:hopescale_log_pause_seconds{cluster="a"}[1m]) > 0', within=120)
        site.wait_for('max_over_time(run:hopescale_checkpoint_interval_seconds{cluster="a"}[1m]) > 0', within=120)
        site.wait_for('run:hopescale_loss:max{cluster="a"} < 0.3')
        yield run


@pytest.mark.usefixtures("run")
def test_a_run_that_is_well_is_silent(site: Site) -> None:
    site.wait_for_evaluations(5)
    assert site.prometheus.query('ALERTS{cluster="a", alertstate="firing"}') == []
    assert site.alerts_of("a") == set()


def test_clips_that_are_none_a_full_disk_and_numbers_that_do_not_arrive(
    site: Site, run: MonitoredRun, clips: Clips
) -> None:
    faults = ("HopescaleNonFiniteSteps", *SAVES, "HopescaleRankBehind")
    clips.overwrite(not_a_number, count=4)
    with run.full_disk(), run.frozen_numbers(rank=1):
        for message in site.wait_until_sent("a", "firing", *faults):
            assert message.annotations["runbook_url"] == f"{RUNBOOKS}/{message.name}.md"
            assert message.annotations["summary"].startswith("a/r")
            assert message.receiver == ("act-now" if message.labels["severity"] == "critical" else "look-today")
    clips.overwrite(easy, count=4)
    site.wait_until_sent("a", "resolved", *faults)


def test_data_that_cannot_be_predicted_and_a_rank_that_is_not_seen(site: Site, run: MonitoredRun, clips: Clips) -> None:
    faults = ("HopescaleLossSpike", "HopescaleRankMissing")
    clips.overwrite(noise)
    with run.lost_numbers(rank=1):
        site.wait_until_sent("a", "firing", *faults)
    clips.overwrite(easy)
    site.wait_until_sent("a", "resolved", *faults)


def test_ranks_that_stop_are_noticed_also_when_their_exporter_stops_too(site: Site, run: MonitoredRun) -> None:
    with run.stopped(run.ranks()):
        site.wait_until_sent("a", "firing", "HopescaleStepStalled")
        with run.stopped([run.exporter()]):
            site.wait_until_sent("a", "firing", "HopescaleExporterDown")
            site.wait_for('ALERTS{cluster="a", alertname="HopescaleRankMissing", alertstate="firing"}')
            site.wait_for_evaluations(3)
            assert site.value('ALERTS{cluster="a", alertname="HopescaleStepStalled", alertstate="firing"}') == 1
            assert site.held_back("a") == {"HopescaleRankMissing"}
        site.wait_until_sent("a", "resolved", "HopescaleExporterDown")
    site.wait_until_sent("a", "resolved", "HopescaleStepStalled")


def test_a_dead_exporter_is_replaced_by_hand_and_the_end_of_the_run_is_silent(site: Site, run: MonitoredRun) -> None:
    address = run.endpoint()
    run.exporter().kill()
    site.wait_until_sent("a", "firing", "HopescaleExporterDown")
    with run.exporter_by_hand(address, site.token_file):
        site.wait_until_sent("a", "resolved", "HopescaleExporterDown")
        # What a stop before may have left: it fell into whatever the ranks were just doing, perhaps a wait.
        site.prometheus.until(lambda: not site.prometheus.query('ALERTS{cluster="a"}'), what="all is well")
        sent = len(site.webhook.messages)
        assert "preempted at step" in run.end()
        assert site.entries("a") == []
        site.prometheus.until(lambda: site.value('up{cluster="a"}') is None, what="the target is gone")
    site.wait_for_evaluations(5)
    assert site.prometheus.query('ALERTS{cluster="a"}') == []
    after = [message for message in site.webhook.messages[sent:] if message.labels["cluster"] == "a"]
    assert [message.name for message in after if message.status == "firing"] == []


@pytest.mark.usefixtures("far_run")
def test_a_run_that_waits_for_its_data_is_noticed_before_its_first_step_and_after(
    site: Site, far_data: SlowFiles
) -> None:
    site.wait_until_sent("b", "firing", "HopescaleNotStarted")

    # Data comes, but slowly.
    far_data.bytes_per_second = 6_000
    site.wait_until_sent("b", "resolved", "HopescaleNotStarted")
    site.wait_until_sent("b", "firing", "HopescaleDataWait")

    # Data comes at once. It takes longer to make up for the time that was lost, of which the wait may have kept silent.
    far_data.bytes_per_second = None
    site.wait_until_sent("b", "resolved", "HopescaleDataWait")
    site.wait_until_sent("b", "firing", "HopescaleGoodputLow")
    site.wait_until_sent("b", "resolved", "HopescaleGoodputLow")
