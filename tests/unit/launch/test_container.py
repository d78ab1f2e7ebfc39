"""What the Dockerfile promises without being built, and the scripts that build and pin, with stand-ins for engines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

import hopescale
from tests.stand_ins import write_program
from tests.user_process import REPO_ROOT

DOCKERFILE = (REPO_ROOT / "Dockerfile").read_text()
FOLDER = REPO_ROOT / "launch" / "container"
DIGEST = "sha256:" + 64 * "a"


def run(script: str, arguments: Sequence[str], path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with `path` as all there is on PATH."""
    command = [shutil.which("bash") or "bash", str(FOLDER / script), *arguments]
    environment = {"PATH": str(path), "HOME": str(path), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A PATH that holds what the scripts are written with, and nothing that builds images."""
    for name in ("basename", "bash", "dirname", "git", "head", "mktemp", "rm", "sed", "sha256sum"):
        (tmp_path / name).symlink_to(shutil.which(name) or os.devnull)
    return tmp_path


def test_the_version_on_the_label_is_the_package_s() -> None:
    assert re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, flags=re.MULTILINE) == [hopescale.__version__]


def test_the_image_takes_the_torch_that_the_package_asks_for() -> None:
    asked = re.findall(r'"(torch[^"]*)",', (REPO_ROOT / "pyproject.toml").read_text())
    assert re.findall(r"'(torch>[^']*)'", DOCKERFILE) == asked


def test_all_that_the_package_is_made_of_reaches_the_build() -> None:
    wheel = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    sources = {*wheel["packages"], *wheel["force-include"]}
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, flags=re.MULTILINE)
    assert sources <= set(" ".join(copied).split())
    assert sources <= {line[1:] for line in (REPO_ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}


@pytest.mark.parametrize(
    ("engine", "device", "begins", "cuda", "tag"),
    [
        ("docker", "cpu", "build", "", "hopescale"),
        ("docker", "cuda", "build", "cu130", "hopescale:cuda"),
        ("podman", "cpu", "build --format docker", "", "hopescale"),
        ("buildah", "cuda", "build --format docker", "cu130", "hopescale:cuda"),
    ],
)
def test_build_calls_the_engine_that_is_there(
    programs: Path, engine: str, device: str, begins: str, cuda: str, tag: str
) -> None:
    write_program(programs, engine, 'echo "$@"')
    ended = run("build.sh", [device, "--no-cache"], programs)
    assert ended.returncode == 0, ended.stderr
    ends = rf"--build-arg CUDA={cuda} --build-arg REVISION=([0-9a-f]{{40}}(-dirty)?|unknown) -t {tag} --no-cache \."
    assert re.fullmatch(f"{begins} {ends}\n", ended.stdout), ended.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ([], {}, "usage: launch/container/build.sh cpu|cuda"),
        (["gpu"], {}, "usage: launch/container/build.sh cpu|cuda"),
        (["cpu"], {}, "no docker, podman or buildah is installed"),
        (["cpu"], {"ENGINE": "docker"}, "ENGINE=docker is not installed."),
        (["cpu"], {"ENGINE": "sed"}, "ENGINE=sed: must be docker, podman or buildah."),
    ],
)
def test_build_says_what_is_wrong(programs: Path, arguments: list[str], variables: dict[str, str], said: str) -> None:
    ended = run("build.sh", arguments, programs, **variables)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in ended.stderr


@pytest.mark.parametrize(
    ("image", "full"),
    [
        ([], "docker.io/library/python:3.11-slim-bookworm"),
        (["alpine:3"], "docker.io/library/alpine:3"),
        (["me/mine:1"], "docker.io/me/mine:1"),
        (["quay.io/me/mine:1"], "quay.io/me/mine:1"),
        (["localhost:5000/mine:1"], "localhost:5000/mine:1"),
    ],
)
def test_pin_asks_for_the_name_with_its_registry(programs: Path, image: list[str], full: str) -> None:
    write_program(programs, "docker", f'[ "$6" = {full} ] && echo {DIGEST}')
    ended = run("pin.sh", image, programs)
    assert (ended.returncode, ended.stdout) == (0, f"BASE_IMAGE={full}@{DIGEST}\n"), ended.stderr


@pytest.mark.parametrize(
    ("arguments", "engine", "said"),
    [
        ([], "", "none of skopeo, docker, podman and buildah is installed"),
        ([f"python@{DIGEST}"], "", "is pinned already; name it by its tag"),
        (["a", "b"], "", "usage: launch/container/pin.sh [IMAGE]"),
        ([], "echo no such host >&2; exit 1", "docker could not read docker.io/library/python:3.11-slim-bookworm"),
        ([], "echo latest", "gave no digest of docker.io/library/python:3.11-slim-bookworm but 'latest'"),
        ([], "true", "but ''"),
    ],
)
def test_pin_prints_a_digest_or_says_why_not(programs: Path, arguments: list[str], engine: str, said: str) -> None:
    if engine:
        write_program(programs, "docker", engine)
    ended = run("pin.sh", arguments, programs)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert said in ended.stderr
