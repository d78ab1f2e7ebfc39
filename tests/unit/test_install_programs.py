"""What installs programs for tests does nothing where they are, and says what to install where it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.user_process import REPO_ROOT, run_as_user

INTEGRATION = REPO_ROOT / "tests" / "integration"
BASH = shutil.which("bash") or "bash"


@pytest.mark.requires("prometheus-server", "alertmanager")
def test_nothing_happens_where_all_is_there(tmp_path: Path) -> None:
    ended = run_as_user([BASH, str(INTEGRATION / "install_prometheus.sh")], tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_where_nothing_can_be_installed_it_says_what_is_missing(tmp_path: Path) -> None:
    for program in ("basename", "dirname", "id", "sort"):
        (tmp_path / program).symlink_to(shutil.which(program) or program)
    missing = {"here": "sh", "gone": "no-such-program-of-anybody", "hosts": "/etc/hosts", "lost": "/etc/no-such-file"}
    script = tmp_path / "install_things.sh"
    needs = " ".join(f"{program}:package-of-{name}" for name, program in missing.items())
    script.write_text(f'source "{INTEGRATION}/install_programs.sh"\ninstall_programs {needs}\n')
    (tmp_path / "sh").symlink_to(shutil.which("sh") or "sh")
    ended = run_as_user(["env", f"PATH={tmp_path}", BASH, str(script)], tmp_path)
    assert ended.returncode == 2
    packages = "package-of-gone package-of-lost"
    said = "Install them as root, for example: apt-get install --no-install-recommends"
    assert ended.stderr == f"[install_things] missing: {packages}. {said} {packages}\n"
