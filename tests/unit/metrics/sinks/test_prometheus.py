from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import MissingExtra, UserError
from data_pipeline.stats import SharderStats
from hopescale.metrics.catalog import CATALOG, by_key
from hopescale.metrics.recorder import Recorder
from hopescale.metrics.schema import MetricsConfig
from hopescale.metrics.sinks.prometheus import (
    PortInUse,
    PrometheusEndpoint,
    RankFile,
    TextfileSidecar,
    check_endpoint,
    check_port,
    endpoint_path,
    rank_folder,
    write_textfile,
)

parser = pytest.importorskip("prometheus_client.parser")

REPO_ROOT = Path(__file__).resolve().parents[4]

RANK = """
import sys, time
from pathlib import Path
from hopescale.metrics.sinks.rank_file import RankFile
file = RankFile(Path(sys.argv[1]), 7)
file.write([("last_step_timestamp_seconds", {"rank": "7"}, 1234.5), ("step_seconds", {"rank": "7"}, 0.25)], time=1.0)
print("written", flush=True)
time.sleep(600)
"""

PARENT = """
import os, sys, time
from pathlib import Path
from hopescale.metrics.schema import MetricsConfig
from hopescale.metrics.sinks.prometheus import PrometheusEndpoint
folder = Path(sys.argv[1])
endpoint = PrometheusEndpoint.start(MetricsConfig(port=0), folder / "live", log_file=folder / "sidecar.log")
# A fork that outlives its parent holds the sidecar's pipe open.
child = os.fork() if sys.argv[2] == "with_fork" else None
if child == 0:
    time.sleep(600)
print("pids", endpoint.pid, child or 0, flush=True)
time.sleep(600)
"""


def get(url: str, token: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token is not None else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(url: str) -> dict[tuple[str, ...], float]:
    status, text = get(url)
    assert status == 200
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def started(config: MetricsConfig, tmp_path: Path, **options) -> PrometheusEndpoint:
    endpoint = PrometheusEndpoint.start(config, tmp_path / "ranks", log_file=tmp_path / "sidecar.log", **options)
    assert endpoint is not None
    return endpoint


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[PrometheusEndpoint]:
    options = {"endpoint_file": endpoint_path(tmp_path)}
    with started(MetricsConfig(port=0), tmp_path, **options) as running:
        yield running


def test_scrape_shows_what_the_recorder_flushed(endpoint: PrometheusEndpoint, tmp_path: Path):
    assert scrape(endpoint.url) == {}
    file, of_the_run = RankFile(tmp_path / "ranks", 0), {"group": ("m", "rest")}
    recorder = Recorder([], rank=0, world_size=1, all_reduce=None, rank_file=file, labels=of_the_run)
    recorder.set("run_info", 1, version="0.1", torch="2.13.0+cpu", config_hash="ab12", incarnation="2")
    recorder.add("loss", 3.0, 4)
    recorder.set("clips_total", 640)
    recorder.set("reader_bytes_total", 2.0**40)
    recorder.set("learning_rate", 0.5)
    recorder.set("learning_rate", 0.25, group="rest")
    recorder.observe_rank("step_seconds", 1.5)
    recorder.flush(10)
    shown = scrape(endpoint.url)
    assert shown["hopescale_step",] == 10
    assert shown["hopescale_loss",] == 0.75
    assert shown["hopescale_clips_total",] == 640
    assert shown["hopescale_reader_bytes_total",] == 2.0**40
    assert shown["hopescale_learning_rate", "group=all"] == 0.5
    assert shown["hopescale_learning_rate", "group=rest"] == 0.25
    assert shown["hopescale_step_seconds", "rank=0"] == 1.5
    assert shown["hopescale_run_info", "config_hash=ab12", "incarnation=2", "torch=2.13.0+cpu", "version=0.1"] == 1


def test_every_catalog_metric_is_exported_under_its_name_and_type(endpoint: PrometheusEndpoint, tmp_path: Path):
    samples = [(metric.key, {name: "x" for name in metric.labels}, 1.0) for metric in CATALOG]
    RankFile(tmp_path / "ranks", 0).write([*samples, ("from_another_version", {}, 1.0)], time=1.0)
    _, text = get(endpoint.url)
    assert {name for name, *_ in scrape(endpoint.url)} == {metric.name for metric in CATALOG}
    for metric in CATALOG:
        assert f"# TYPE {metric.name} {metric.kind}\n" in text
        assert f"# HELP {metric.name} {metric.help}\n" in text


def test_a_killed_rank_stays_visible_with_its_last_numbers(endpoint: PrometheusEndpoint, tmp_path: Path):
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, str(tmp_path / "ranks")], stdout=subprocess.PIPE, cwd=REPO_ROOT
    )
    assert rank.stdout is not None
    with rank.stdout as out:
        assert out.readline() == b"written\n"
    before = scrape(endpoint.url)
    rank.send_signal(signal.SIGSTOP)
    assert scrape(endpoint.url) == before
    rank.kill()
    rank.wait()
    assert scrape(endpoint.url) == before
    assert before["hopescale_last_step_timestamp_seconds", "rank=7"] == 1234.5


def test_free_port_is_written_to_the_run_folder_and_withdrawn(tmp_path: Path, caplog):
    caplog.set_level("INFO")
    path = endpoint_path(tmp_path)
    with started(MetricsConfig(port=0), tmp_path, endpoint_file=path) as endpoint:
        entry = json.loads(path.read_text())
        assert (entry["host"], entry["port"]) == ("127.0.0.1", endpoint.port)
        assert entry["url"] == endpoint.url
        assert endpoint.port > 0
        assert f"metrics: {endpoint.url}" in caplog.text
        assert get(endpoint.url.replace("/metrics", "/healthz")) == (200, "ok\n")
        assert get(endpoint.url.replace("/metrics", "/../etc/passwd"))[0] == 404
    assert not path.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(endpoint.pid, 0)
    assert (tmp_path / "sidecar.log").read_text() == ""
    endpoint.close()


def test_port_of_another_process_is_refused_with_field_value_rule_and_fix(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = MetricsConfig(port=port)
        for attempt in (
            lambda: check_port("127.0.0.1", port),
            lambda: check_endpoint(config),
            lambda: started(config, tmp_path),
        ):
            with pytest.raises(PortInUse) as caught:
                attempt()
            (problem,) = caught.value.problems
            assert (problem.field, problem.value) == ("metrics.port", port)
            assert "already listens" in problem.rule
            assert "metrics.listen=off" in problem.fix
            assert "another port" in problem.fix
    check_port("127.0.0.1", port)


def test_port_taken_between_the_check_and_the_start_is_refused_too(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hopescale.metrics.sinks.prometheus.check_port", lambda host, port: None)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(PortInUse):
        started(MetricsConfig(port=other.getsockname()[1]), tmp_path)


def test_address_of_no_interface_is_refused():
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1:0") as caught:
        check_port("192.0.2.1", 0)
    assert not isinstance(caught.value, PortInUse)


def test_listening_on_the_network_needs_a_token_file_that_holds_one(tmp_path: Path):
    with pytest.raises(UserError, match=r"metrics.token_file=None: metrics.listen=node serves the network"):
        started(MetricsConfig(listen="node", port=0), tmp_path, host="127.0.0.1")
    missing = MetricsConfig(listen="node", port=0, token_file=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="No such file"):
        check_endpoint(missing, host="127.0.0.1")
    (tmp_path / "empty").write_text("\n")
    empty = MetricsConfig(listen="node", port=0, token_file=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="must not be empty"):
        check_endpoint(empty, host="127.0.0.1")


def test_all_problems_are_named_at_once():
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = MetricsConfig(listen="node", port=other.getsockname()[1])
        with pytest.raises(UserError) as caught:
            check_endpoint(config, host="127.0.0.1")
    assert [problem.field for problem in caught.value.problems] == ["metrics.token_file", "metrics.port"]


def test_only_the_right_token_opens_a_node_endpoint(tmp_path: Path):
    token = tmp_path / "token"
    token.write_text("s3cret-\u00fc\n", encoding="latin-1")
    token.chmod(0o600)
    config = MetricsConfig(listen="node", port=0, token_file=str(token))
    with started(config, tmp_path, host="127.0.0.1") as endpoint:
        for wrong in (None, "", "s3cret", "s3cret-\u00fc2"):
            assert get(endpoint.url, wrong)[0] == 401
            assert get(endpoint.url.replace("/metrics", "/healthz"), wrong)[0] == 401
        assert get(endpoint.url, "s3cret-\u00fc")[0] == 200
        command_line = Path(f"/proc/{endpoint.pid}/cmdline").read_bytes()
        assert b"s3cret" not in command_line


def test_off_starts_nothing_and_checks_nothing(tmp_path: Path):
    config = MetricsConfig(listen="off", token_file="/absent")
    check_endpoint(config)
    assert PrometheusEndpoint.start(config, tmp_path / "ranks", log_file=tmp_path / "log") is None
    assert not (tmp_path / "ranks").exists()


@pytest.mark.parametrize("fork", ["alone", "with_fork"])
def test_sidecar_ends_when_its_parent_is_killed(tmp_path: Path, fork: str):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), fork], stdout=subprocess.PIPE, text=True, cwd=REPO_ROOT
    )
    assert parent.stdout is not None
    with parent.stdout as out:
        line = next(line for line in out if line.startswith("pids"))
    sidecar, child = (int(word) for word in line.split()[1:])
    sidecar_handle = os.pidfd_open(sidecar)
    try:
        parent.kill()
        parent.wait()
        # A pidfd is readable once the process has ended.
        assert select.select([sidecar_handle], [], [], 30)[0]
    finally:
        os.close(sidecar_handle)
        if child:
            os.kill(child, signal.SIGKILL)


def test_signals_meant_for_the_job_leave_the_sidecar_serving(endpoint: PrometheusEndpoint):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(endpoint.pid, number)
    assert get(endpoint.url)[0] == 200


def test_idle_connections_are_limited_and_do_not_outlive_their_time(endpoint: PrometheusEndpoint):
    address = (endpoint.host, endpoint.port)
    idle = [socket.create_connection(address) for _ in range(50)]
    try:
        threads = Path(f"/proc/{endpoint.pid}/task")
        assert len(list(threads.iterdir())) <= 2 + 2 * 8
    finally:
        for connection in idle:
            connection.close()
    deadline = time.monotonic() + 20
    while True:
        try:
            assert get(endpoint.url)[0] == 200
            break
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_sidecar_imports_neither_torch_nor_pydantic(tmp_path: Path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from hopescale.metrics.sinks import prometheus_sidecar as sidecar\n"
        "from prometheus_client import generate_latest\n"
        "generate_latest(sidecar.build_registry(Path(sys.argv[1])))\n"
        "print({'torch', 'numpy', 'pydantic'} & set(sys.modules) or 'none')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=REPO_ROOT)
    assert (done.stdout, done.stderr) == ("none\n", "")


def test_missing_client_library_is_named_before_anything_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtra, match=r"hopescale\[prometheus\]"):
        check_endpoint(MetricsConfig(port=0))


def test_a_sidecar_that_cannot_run_is_an_error_that_names_its_log(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hopescale.metrics.sinks.prometheus._SIDECAR", "hopescale.no_such_module")
    with pytest.raises(RuntimeError, match=r"ended; see .*sidecar\.log"):
        started(MetricsConfig(port=0), tmp_path)
    assert "no_such_module" in (tmp_path / "sidecar.log").read_text()


def test_a_restarted_job_shows_no_ranks_of_its_earlier_incarnation(tmp_path: Path):
    folders = [rank_folder(tmp_path, "n1", incarnation) for incarnation in (0, 1, 2)]
    for folder in folders:
        RankFile(folder, 0).write([("step", {}, int(folder.name))], time=1.0)
    endpoint = PrometheusEndpoint.start(MetricsConfig(port=0), folders[1], log_file=tmp_path / "log")
    assert endpoint is not None
    with endpoint:
        assert scrape(endpoint.url) == {(by_key("step").name,): 1.0}
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_an_earlier_start_withdraws_only_its_own_endpoint(tmp_path: Path) -> None:
    announced = tmp_path / "metrics-endpoint.json"
    config = MetricsConfig(port=0)
    earlier, later = (
        PrometheusEndpoint.start(config, tmp_path / name, log_file=tmp_path / "log", endpoint_file=announced)
        for name in ("000000", "000001")
    )
    assert earlier is not None
    assert later is not None
    told = announced.read_bytes()
    earlier.close()
    assert announced.read_bytes() == told
    later.close()
    assert not announced.exists()


def test_a_node_where_nothing_listens_keeps_a_file_for_as_long_as_its_run_lives(tmp_path: Path, monkeypatch):
    folder, textfiles = tmp_path / "live" / "n1" / "000000", tmp_path / "textfiles"
    textfiles.mkdir()
    file = RankFile(folder, 7)
    file.write([("step", {}, 1.0), ("step_seconds", {"rank": "7"}, 0.25)], time=1.0)
    named = {"cluster": "east", "run": "a", "node": "n1"}
    with TextfileSidecar(folder, textfiles, named, 0, run=tmp_path / "a", log_file=tmp_path / "log") as kept:
        assert [path.match("hopescale-east-a-*-0.prom") for path in textfiles.iterdir()] == [True]
        assert stat.S_IMODE(kept.path.stat().st_mode) == 0o644
        assert text_samples(kept.path) == {
            ("hopescale_step", "east", "n1", "a"): 1.0,
            ("hopescale_step_seconds", "east", "n1", "7", "a"): 0.25,
        }
        file.write([("step", {}, 2.0)], time=2.0)
        deadline = time.monotonic() + 60
        while text_samples(kept.path)["hopescale_step", "east", "n1", "a"] != 2.0:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not list(textfiles.iterdir())


def text_samples(path: Path) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in parser.text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


def test_a_folder_of_text_files_that_cannot_be_written_is_an_error(tmp_path: Path):
    named = {"cluster": "c", "run": "a"}
    with pytest.raises(UserError, match=r"nowhere: cannot be written") as refused:
        TextfileSidecar(tmp_path / "live", tmp_path / "nowhere", named, 0, run=tmp_path, log_file=tmp_path / "log")
    assert "--collector.textfile.directory" in refused.value.problems[0].fix


def test_the_sharders_text_file_is_one_that_prometheus_reads(tmp_path: Path):
    parser = pytest.importorskip("prometheus_client.parser")
    path = tmp_path / "shard.prom"
    for clips in (1, 250):
        write_textfile(path, SharderStats(clips=clips, bytes=1 << 40, shards=2, skipped=3, bad=4, seconds=1.5))
    families = {family.name: family for family in parser.text_string_to_metric_families(path.read_text())}
    found = {name: family.samples[0].value for name, family in families.items()}
    assert found == {
        "hopescale_sharder_clips": 250,
        "hopescale_sharder_bytes": 1 << 40,
        "hopescale_sharder_shards": 2,
        "hopescale_sharder_skipped_clips": 3,
        "hopescale_sharder_bad_clips": 4,
        "hopescale_sharder_seconds": 1.5,
    }
    assert {family.type for family in families.values()} == {"counter"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["shard.prom"]
