from __future__ import annotations

import pytest

from hopescale.errors import ConfigError
from hopescale.slurm.environment import SlurmJob, read_job

NAMES = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME")


@pytest.fixture
def job_of(monkeypatch: pytest.MonkeyPatch):
    def read(*values: str | None) -> SlurmJob | None:
        for name, value in zip(NAMES, values, strict=True):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        return read_job()

    return read


def test_outside_a_job_there_is_none(job_of) -> None:
    assert job_of(None, "3", None) is None


def test_a_job_says_its_restarts_and_its_end(job_of) -> None:
    assert job_of("17", None, None) == SlurmJob("17", 0, None)
    assert job_of("17", "2", "1700000000") == SlurmJob("17", 2, 1.7e9)


@pytest.mark.parametrize("text", ["", "17; rm -rf /", "1_2", "-1", "9" * 13, "१७"])
def test_what_is_no_number_is_refused(job_of, text: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_ID"):
        job_of(text, None, None)
    with pytest.raises(ConfigError, match="SLURM_RESTART_COUNT"):
        job_of("17", text, None)


def test_a_requeued_job_succeeds_its_own_earlier_start_only() -> None:
    later = SlurmJob("17", 2)
    assert later.succeeds(SlurmJob("17", 1))
    assert not later.succeeds(SlurmJob("17", 2))
    assert not later.succeeds(SlurmJob("17", 3))
    assert not later.succeeds(SlurmJob("18", 1))
