"""Slurm's own programs, called without a shell; what they refuse is told in their words."""

from __future__ import annotations

import shutil
import subprocess

from hopescale.errors import Problem, UserError

TIMEOUT_SECONDS = 60.0


def slurm(program: str, *arguments: str) -> str:
    """Run one and return what it prints.

    Raises:
        UserError: it is not installed, it refuses, or its controller does not answer.
    """
    if shutil.which(program) is None:
        fix = "load the module that has it, or go to a login node of the cluster"
        raise UserError(Problem("slurm", program, "is not a program on this machine", fix))
    try:
        ended = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        rule = f"did not answer within {TIMEOUT_SECONDS:g} s"
        raise UserError(Problem("slurm", program, rule, "see whether the controller is up: scontrol ping")) from None
    if ended.returncode != 0:
        said = " ".join(line.strip() for line in ended.stderr.splitlines() if line.strip()) or "no reason"
        rule = f"refused with code {ended.returncode}: {said}"
        fix = "see what the cluster offers: sinfo, sacctmgr show assoc; then change the field of cluster that it names"
        raise UserError(Problem("slurm", program, rule, fix))
    return ended.stdout


def job_state(job: str) -> str | None:
    """State of a job and the reason for it, as squeue has them; None where it no longer knows the job.

    Raises:
        UserError: squeue is not installed, or the controller does not answer.
    """
    try:
        found = slurm("squeue", "--noheader", "--job", job, "--states", "all", "--format", "%T %r").split(maxsplit=1)
    except UserError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return " ".join(found).strip() or None
