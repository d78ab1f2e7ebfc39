"""Real runs under a real Prometheus and a real Alertmanager: every alert fires by its fault and ends with it.

The configuration and the rules are those of `ops/`, with seconds in place of hours.
"""

from __future__ import annotations

import os
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
    "metrics.every=2",
    "metrics.port=0",
    "metrics.tensorboard=false",
    "checkpoint.every=10",
    "checkpoint.keep=2",
]
AFTER_A_STALL = {"HopescaleDataWait", "HopescaleGoodputLow"}
"""A stop falls into whatever the ranks were just doing, which may be a wait."""


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
        f"metrics.token_file={site.token_file}",
    ]
    with MonitoredRun(folder / "run", settings, ranks=1) as run:
        site.list_target("b-n1", run.endpoint(), {"cluster": "b", "run": "r", "node": "n1"})
        yield run


def easy(shape: tuple[int, ...]) -> np.ndarray:
    """The same picture all the time: soon predicted well."""
    return np.broadcast_to(np.random.default_rng(1).normal(size=shape[1:]), shape)


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng().normal(size=shape)


def not_a_number(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, np.nan)


@pytest.mark.usefixtures("far_run")
def test_a_run_is_watched_through_all_that_befalls_it(site: Site, dataset: Path, tmp_path: Path) -> None:
    own_data = shutil.copytree(dataset, tmp_path / "data")
    clips = Clips.of(own_data)
    clips.overwrite(easy)
    settings = [*SMALL, f"data.path={own_data}", "data.reader.checksums=false", f"metrics.token_file={site.token_file}"]
    with MonitoredRun(tmp_path / "run", settings) as run:
        address = run.endpoint()
        site.list_target("a-n1", address, {"cluster": "a", "run": "r", "node": "n1", "slurm_job_id": "7"})

        # Nothing is wrong.
        site.wait_for('run:hopescale_log_pause_seconds{cluster="a"} > 0')
        site.wait_for('run:hopescale_checkpoint_interval_seconds{cluster="a"} > 0')
        site.wait_for('run:hopescale_loss:max{cluster="a"} < 0.3')
        site.wait_for_evaluations(5)
        assert site.alerts_of("a") == set()

        # A clip that is none, a full disk, and a rank whose numbers do not arrive.
        frozen = ("HopescaleRankBehind",)
        broken = (
            "HopescaleNonFiniteSteps",
            "HopescaleDiskFilling",
            "HopescaleCheckpointFailing",
            "HopescaleCheckpointOld",
        )
        own, aside = run.rank_file(1), run.rank_file(1).with_suffix(".aside")
        own.rename(aside)
        shutil.copy(aside, own)
        clips.overwrite(not_a_number, count=1)
        with run.full_disk():
            for message in site.wait_until_sent("a", "firing", *broken, *frozen):
                assert message.annotations["runbook_url"] == f"{RUNBOOKS}/{message.name}.md"
                assert message.receiver == ("act-now" if message.labels["severity"] == "critical" else "look-today")
                assert message.annotations["summary"].startswith("a/r")
                assert (message.labels["cluster"], message.labels["slurm_job_id"]) == ("a", "7")
        clips.overwrite(easy, count=1)
        os.replace(aside, own)
        site.wait_until_sent("a", "resolved", *broken, *frozen)

        # Data that cannot be predicted, and a rank whose file is gone.
        clips.overwrite(noise)
        own.rename(aside)
        site.wait_until_sent("a", "firing", "HopescaleLossSpike", "HopescaleRankMissing")
        clips.overwrite(easy)
        os.replace(aside, own)
        site.wait_until_sent("a", "resolved", "HopescaleLossSpike", "HopescaleRankMissing")

        # The ranks stop, then the exporter, too.
        with run.stopped(run.ranks()):
            site.wait_until_sent("a", "firing", "HopescaleStepStalled")
            with run.stopped([run.exporter()]):
                site.wait_until_sent("a", "firing", "HopescaleExporterDown")
                site.wait_for('ALERTS{cluster="a", alertname="HopescaleRankMissing", alertstate="firing"}')
                site.wait_for_evaluations(3)
                assert site.value('ALERTS{cluster="a", alertname="HopescaleStepStalled", alertstate="firing"}') == 1
                held_back = site.webhook.latest("HopescaleRankMissing", cluster="a")
                assert held_back is not None
                assert held_back.status == "resolved"
            site.wait_until_sent("a", "resolved", "HopescaleExporterDown")
        site.wait_until_sent("a", "resolved", "HopescaleStepStalled")

        # The exporter is killed, and another one started in its place.
        run.exporter().kill()
        site.wait_until_sent("a", "firing", "HopescaleExporterDown")
        with run.exporter_by_hand(address, site.token_file):
            site.wait_until_sent("a", "resolved", "HopescaleExporterDown")

            # It ends in good order.
            assert "preempted at step" in run.end()
            site.remove_target("a-n1")
    site.prometheus.until(lambda: site.value('up{cluster="a"}') is None, what="the target is gone")
    site.wait_for_evaluations(5)
    assert site.prometheus.query('ALERTS{cluster="a"}') == []
    assert site.alerts_of("a") - AFTER_A_STALL == {
        *broken,
        *frozen,
        "HopescaleExporterDown",
        "HopescaleLossSpike",
        "HopescaleRankMissing",
        "HopescaleStepStalled",
    }


@pytest.mark.usefixtures("far_run")
def test_a_run_waits_for_a_server_of_data(site: Site, far_data: SlowFiles) -> None:
    site.wait_until_sent("b", "firing", "HopescaleNotStarted")

    # Data comes, but slowly.
    far_data.bytes_per_second = 5_000
    site.wait_until_sent("b", "resolved", "HopescaleNotStarted")
    site.wait_until_sent("b", "firing", "HopescaleDataWait")

    # Data comes at once. It takes longer to make up for the time that was lost, of which the wait may have kept silent.
    far_data.bytes_per_second = None
    site.wait_until_sent("b", "resolved", "HopescaleDataWait")
    site.wait_until_sent("b", "firing", "HopescaleGoodputLow")
    site.wait_until_sent("b", "resolved", "HopescaleGoodputLow")
    fired = {"HopescaleNotStarted", "HopescaleDataWait", "HopescaleGoodputLow"}
    # Time that a run trains or waits without a checkpoint is time that it may lose.
    assert fired <= site.alerts_of("b") <= fired | {"HopescaleCheckpointOld"}
