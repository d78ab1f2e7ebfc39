"""The README's commands do what they say: the step-by-step block is run as it stands, only smaller."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.user_process import REPO_ROOT, run_as_user

README = (REPO_ROOT / "README.md").read_text()

pytestmark = pytest.mark.integration

# What makes a command small; a command not listed here runs as it stands.
SMALLER = {
    "hopescale data simulate": ["num_train=4", "num_heldout=1"],
    "torchrun": ["train.steps=2", "train.global_batch=4", "metrics.port=0"],
}


def blocks() -> list[list[str]]:
    """Lines of each fenced bash block, comments cut off."""
    fenced = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [
        [line.split("#")[0].strip() for line in block.splitlines() if line.split("#")[0].strip()] for block in fenced
    ]


def as_installed(words: list[str]) -> list[str]:
    """The same command without the scripts an installation puts on PATH."""
    if words[0] == "hopescale":
        return [sys.executable, "-m", "hopescale.cli", *words[1:]]
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", *rendezvous(), *words[1:]]
    raise AssertionError(f"no test knows how to run {words[0]}")


def rendezvous() -> list[str]:
    return ["--rdzv-endpoint", "127.0.0.1:0"]


@pytest.mark.requires("demo", "2ranks")
def test_the_step_by_step_block_runs_in_order(tmp_path: Path) -> None:
    steps = next(block for block in blocks() if block[0].startswith("hopescale data simulate"))
    assert len(steps) == 6
    for line in steps:
        smaller = next((more for start, more in SMALLER.items() if line.startswith(start)), [])
        ended = run_as_user(as_installed([*shlex.split(line), *smaller]), tmp_path)
        assert ended.returncode == 0, f"{line}\n{ended.stdout}{ended.stderr}"
    assert (tmp_path / "runs" / "mine" / "report" / "filmstrip.png").is_file()


def test_the_first_block_names_the_two_scripts() -> None:
    assert [shlex.split(line)[1] for line in blocks()[0]] == ["launch/quickstart.sh", "launch/test.sh"]
    assert all((REPO_ROOT / shlex.split(line)[1]).is_file() for line in blocks()[0])


def test_every_linked_file_exists() -> None:
    for page in [REPO_ROOT / "README.md", *REPO_ROOT.glob("*/README.md"), *REPO_ROOT.glob("hopescale/*/README.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
