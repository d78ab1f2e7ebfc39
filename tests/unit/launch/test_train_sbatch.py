"""The job script with programs of Slurm that a test has written: what it starts, and what it makes of the outcome."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.stand_ins import write_program
from tests.user_process import REPO_ROOT

SCRIPT = REPO_ROOT / "launch" / "slurm" / "train.sbatch"
Job = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that come before the machine's; each says in calls.log that it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def program(folder: Path, name: str, does: str = "") -> None:
    write_program(folder, name, f'printf \'%s\\n\' "{name} $*" >>"$CALLS"', does)


@pytest.fixture
def job(programs: Path, tmp_path: Path) -> Job:
    """Run the script as the batch step of job 42."""

    def run(
        *settings: str,
        env: Mapping[str, str] | None = None,
        outcome: dict | None = None,
        nodes: int = 1,
        srun: str = "",
    ) -> subprocess.CompletedProcess[str]:
        told = ""
        if outcome is not None:
            start = f"42-{(env or {}).get('SLURM_RESTART_COUNT', 0)}"
            said = json.dumps({"start": start} | outcome, indent=1)
            told = f"printf '%s' {shlex.quote(said)} >\"$RUN/status.json\""
        program(programs, "srun", f"{srun}\n{told}")
        program(programs, "scontrol", "case $1 in show) echo n1 ;; esac")
        if not (programs / "squeue").exists():
            program(programs, "squeue")
        if not (programs / "getent").exists():
            program(programs, "getent", "echo 10.0.0.1 STREAM n1")
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls.log"),
            "RUN": str(tmp_path / "run"),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "n[1-2]",
            **(env or {}),
        }
        kept = (tmp_path / "run" / "slurm" / "settings").exists()
        command = ["bash", str(SCRIPT), str(tmp_path / "run"), *(settings or ([] if kept else ["experiment=demo"]))]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    return run


def complaint(*arguments: str | Path, **variables: str) -> str:
    """What the script says that ends it with code 2, where there is no program of Slurm's."""
    command, environment = ["bash", str(SCRIPT), *map(str, arguments)], {"PATH": os.environ["PATH"], **variables}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    return ended.stderr


def calls(tmp_path: Path, name: str) -> list[str]:
    path = tmp_path / "calls.log"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line for line in lines if line.split()[0] == name]


def status(state: str, code: int = 0, incarnation: int = 0) -> dict:
    return {"state": state, "code": code, "step": 8, "incarnation": incarnation}


def test_one_task_a_node_starts_the_ranks_of_its_node(job: Job, tmp_path: Path) -> None:
    env = {"SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "3", "HOPESCALE_PYTHON": "/opt/python"}
    ended = job("train.steps=5", "model.grid=[2, 3]", env=env, outcome=status("finished"), nodes=2)
    assert ended.returncode == 0, ended.stderr
    (started,) = calls(tmp_path, "srun")
    assert "--ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 /opt/python -m torch.distributed.run" in started
    assert "--nnodes 2 --nproc-per-node 8 --max-restarts 0" in started
    assert "--rdzv-id 42-3 --rdzv-endpoint 10.0.0.1:20042" in started
    assert started.endswith(f"-m hopescale.train train.steps=5 model.grid=[2, 3] run.dir={tmp_path / 'run'}")


def test_settings_of_the_run_folder_count_where_none_are_given(job: Job, tmp_path: Path) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "settings").write_text("experiment=demo\nrun.name=$(touch CANARY)\n")
    assert job(outcome=status("finished")).returncode == 0
    assert "experiment=demo run.name=$(touch CANARY) run.dir=" in calls(tmp_path, "srun")[0]


@pytest.mark.parametrize("answer", ["echo 127.0.1.1 STREAM n1", "echo ::1 STREAM n1; echo fe80::1 STREAM n1", "exit 2"])
def test_several_nodes_never_meet_at_a_loopback_address(job: Job, programs: Path, tmp_path: Path, answer: str) -> None:
    program(programs, "getent", answer)
    refused = job(outcome=status("finished"), nodes=2)
    assert refused.returncode == 2
    assert "the name of the first node, n1, leads to no address" in refused.stderr
    assert "HOPESCALE_HEAD" in refused.stderr
    assert not calls(tmp_path, "srun")
    assert job(outcome=status("finished"), nodes=2, env={"HOPESCALE_HEAD": "127.0.0.1"}).returncode == 2
    assert job(outcome=status("finished"), nodes=2, env={"HOPESCALE_HEAD": "10.1.1.1"}).returncode == 0
    assert "--rdzv-endpoint 10.1.1.1:20042" in calls(tmp_path, "srun")[0]


def test_the_second_address_of_a_name_counts_where_the_first_is_loopback(
    job: Job, programs: Path, tmp_path: Path
) -> None:
    program(programs, "getent", "echo 127.0.1.1 STREAM n1; echo fd00::7 STREAM n1")
    assert job(outcome=status("finished"), nodes=2).returncode == 0
    assert "--rdzv-endpoint [fd00::7]:20042" in calls(tmp_path, "srun")[0]


@pytest.mark.parametrize(
    ("outcome", "code", "requeued"),
    [
        (status("finished"), 0, False),
        (status("preempted", 75), 75, True),
        (status("failed", 2), 2, False),
        (status("failed", 72), 72, False),
        (status("running"), 1, True),
        (None, 1, True),
    ],
)
def test_the_status_decides(job: Job, tmp_path: Path, outcome: dict | None, code: int, requeued: bool) -> None:
    assert job(outcome=outcome).returncode == code
    assert bool([call for call in calls(tmp_path, "scontrol") if call == "scontrol requeue 42"]) == requeued


def test_a_status_of_an_earlier_start_is_not_taken_for_this_ones(job: Job) -> None:
    assert job(outcome=status("preempted", 75)).returncode == 75
    again = {"SLURM_RESTART_COUNT": "1"}
    crashed = job(outcome=status("preempted", 75) | {"start": "42-0"}, env=again)
    assert (crashed.returncode, "is missing, old, or still says running" in crashed.stderr) == (1, True)
    assert job(outcome=status("finished"), env=again).returncode == 0


@pytest.mark.parametrize("how", ["by the setting", "by the user"])
def test_a_job_that_is_not_to_go_on_is_not_requeued(job: Job, tmp_path: Path, how: str) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    if how == "by the user":
        (tmp_path / "run" / "slurm" / "cancelled").write_text("42\n")
    env = {"HOPESCALE_REQUEUE": "0"} if how == "by the setting" else {}
    assert job(outcome=status("preempted", 75), env=env).returncode == 75
    assert "scontrol requeue 42" not in calls(tmp_path, "scontrol")


def test_that_another_job_of_the_run_was_cancelled_does_not_concern_this_one(job: Job, tmp_path: Path) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "cancelled").write_text("41\n")
    assert job(outcome=status("preempted", 75)).returncode == 75
    assert "scontrol requeue 42" in calls(tmp_path, "scontrol")


@pytest.mark.parametrize(
    ("state", "ends_in", "requeued"),
    [("COMPLETING", 100, False), ("COMPLETING", -1, True), ("RUNNING", 100, True), ("", 100, True)],
)
def test_a_job_that_slurm_ends_before_its_time_does_not_take_itself_back(
    job: Job, programs: Path, tmp_path: Path, state: str, ends_in: int, requeued: bool
) -> None:
    program(programs, "squeue", f"echo {state}")
    env = {"SLURM_JOB_END_TIME": str(int(time.time()) + ends_in)}
    ended = job(outcome=status("preempted", 75), env=env)
    assert ended.returncode == 75
    assert ("scontrol requeue 42" in calls(tmp_path, "scontrol")) == requeued
    assert ("is being ended from outside: not requeued" in ended.stderr) != requeued


def test_crashes_without_a_checkpoint_between_them_spend_the_budget(job: Job, tmp_path: Path) -> None:
    assert [job(outcome=status("running", incarnation=n)).returncode for n in range(2)] == [1, 1]
    (tmp_path / "run" / "checkpoints" / "step-000000010").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-000000010.damaged").mkdir()
    assert [job(outcome=status("running", incarnation=n)).returncode for n in range(2, 5)] == [1, 1, 70]
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == status("failed", 70, 4) | {"start": "42-0"}
    assert len([call for call in calls(tmp_path, "scontrol") if "requeue" in call]) == 4


def test_stops_without_a_new_checkpoint_spend_it_too(job: Job, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000010"
    saves = f"mkdir -p {checkpoint}"
    assert [job(outcome=status("preempted", 75)).returncode for _ in range(2)] == [75, 75]
    assert job(outcome=status("preempted", 75), srun=saves).returncode == 75
    assert [job(outcome=status("preempted", 75)).returncode for _ in range(3)] == [75, 75, 70]


def test_a_start_that_another_has_superseded_leaves_the_run_alone(job: Job, tmp_path: Path) -> None:
    targets = tmp_path / "targets"
    targets.mkdir()
    (targets / "a-job42-start000001-0.json").touch()
    later = "echo 42-1 >$RUN/slurm/start"
    superseded = job(outcome=status("running"), srun=later, env={"HOPESCALE_DISCOVERY": str(targets)})
    assert (superseded.returncode, "start 42-1 has taken the run over" in superseded.stderr) == (74, True)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "running"
    assert "scontrol requeue 42" not in calls(tmp_path, "scontrol")
    assert not (tmp_path / "run" / "slurm" / "crashes").exists()
    assert list(targets.iterdir())


@pytest.mark.parametrize(("state", "refused"), [("RUNNING", True), ("COMPLETED", False), ("", False)])
def test_a_run_that_another_job_trains_is_not_touched(
    job: Job, programs: Path, tmp_path: Path, state: str, refused: bool
) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "start").write_text("41-3\n")
    (tmp_path / "run" / "stop").touch()
    program(programs, "squeue", f"echo {state}")
    ended = job(outcome=status("finished"))
    assert ended.returncode == (2 if refused else 0)
    assert ("job 41 is training there" in ended.stderr) == refused
    assert (tmp_path / "run" / "stop").exists() == refused


def test_a_log_that_cannot_be_written_ends_nothing(job: Job, programs: Path, tmp_path: Path) -> None:
    assert job(outcome=status("preempted", 75)).returncode == 75
    with Path("/dev/full").open("w") as full:
        command = ["bash", str(SCRIPT), str(tmp_path / "run"), "experiment=demo"]
        variables = {"CALLS": str(tmp_path / "calls.log"), "RUN": str(tmp_path / "run"), "SLURM_JOB_ID": "42"}
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", **variables}
        ended = subprocess.run(command, env=environment, stdout=full, stderr=full, timeout=60, check=False)
    assert ended.returncode == 75
    assert len(calls(tmp_path, "srun")) == 2


def test_a_job_without_settings_is_told(tmp_path: Path) -> None:
    assert "no settings: give them after RUN" in complaint(tmp_path / "run", SLURM_JOB_ID="42")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_no_setting_can_name_is_refused(tmp_path: Path) -> None:
    said = complaint(tmp_path / "lr=1", "experiment=demo", SLURM_JOB_ID="42")
    assert "lr=1: must be a path of letters" in said


def test_a_signal_of_slurm_asks_the_trainer_and_not_torchrun(job: Job, tmp_path: Path) -> None:
    waits = 'kill -USR1 $PPID; for _ in {1..600}; do [ -e "$RUN/stop" ] && break; sleep 0.1; done; [ -e "$RUN/stop" ]'
    ended = job(outcome=status("preempted", 75), srun=waits)
    assert (ended.returncode, "told to stop: asking for a checkpoint" in ended.stderr) == (75, True)


def test_a_request_of_an_earlier_start_is_forgotten(job: Job, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert job(outcome=status("finished")).returncode == 0
    assert not (tmp_path / "run" / "stop").exists()


def test_a_job_that_is_cancelled_while_it_starts_is_told_so(job: Job, tmp_path: Path) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "cancelled").write_text("42\n")
    (tmp_path / "run" / "stop").touch()
    job(outcome=status("preempted", 75))
    assert (tmp_path / "run" / "stop").exists()
    assert "scontrol requeue 42" not in calls(tmp_path, "scontrol")


def test_variables_of_a_file_reach_the_ranks(job: Job, tmp_path: Path) -> None:
    (tmp_path / "site.env").write_text("# the fast network\nNCCL_SOCKET_IFNAME=ib0,ib1\n\nNCCL_DEBUG=WARN")
    env = {"HOPESCALE_ENV_FILE": str(tmp_path / "site.env")}
    ended = job(outcome=status("finished"), env=env, srun='echo "$NCCL_SOCKET_IFNAME $NCCL_DEBUG"')
    assert ended.stdout == "ib0,ib1 WARN\n"


@pytest.mark.parametrize(
    "name", ["demo.env", *sorted(p.name for p in (REPO_ROOT / "launch" / "cluster").glob("*.env"))]
)
def test_the_files_that_come_with_it_can_be_read(job: Job, name: str, tmp_path: Path) -> None:
    path = REPO_ROOT / "launch" / "cluster" / name
    if name == "demo.env":
        path = tmp_path / name
        path.write_text("A=1\n")
    assert job(outcome=status("finished"), env={"HOPESCALE_ENV_FILE": str(path)}).returncode == 0


def test_hostile_lines_of_a_file_are_no_assignments(job: Job, tmp_path: Path) -> None:
    rng, pieces = random.Random(0), "$(touch CANARY);|&`<>'\" \\{}*?[]!~\x01\u2028é="
    names = ["NCCL_DEBUG", "PATH ", "a", "LD_PRELOAD;", "export X", "X-Y", ""]
    lines = [
        rng.choice(names) + rng.choice(["=", " = ", ""]) + "".join(rng.choices(pieces, k=rng.randint(1, 6)))
        for _ in range(10_000)
    ]
    (tmp_path / "lines").write_text("\n".join(lines))
    rule = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("is_assignment()"))
    loop = f'{rule}\nwhile IFS= read -r line; do is_assignment "$line" && printf \'%s\\n\' "$line"; done <lines; exit 0'
    ran = subprocess.run(["bash", "-c", loop], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    # Of what is taken, nothing would do anything even where it is not quoted.
    taken = ran.stdout.splitlines()
    assert taken
    assert not set("".join(taken)) & set("$();|&`<>'\" \\{}*?[]!~")
    for line in ("A=$(touch CANARY)", "A B=1", "=1", "A"):
        (tmp_path / "site.env").write_text(f"OK=1\n{line}\n")
        refused = job(env={"HOPESCALE_ENV_FILE": str(tmp_path / "site.env")})
        assert (refused.returncode, "site.env, line 2: must be NAME=VALUE" in refused.stderr) == (2, True), line


def test_a_file_that_is_not_there_is_told(job: Job, tmp_path: Path) -> None:
    refused = job(env={"HOPESCALE_ENV_FILE": str(tmp_path / "none.env")})
    assert (refused.returncode, "none.env: is no file" in refused.stderr) == (2, True)


CONTAINERS = {
    "none": ({}, "srun --ntasks 1 --ntasks-per-node 1 --kill-on-bad-exit=1 python3 -m torch.distributed.run"),
    "pyxis": (
        {"HOPESCALE_CONTAINER": "/images/h.sqsh", "HOPESCALE_MOUNTS": "/data:/data:ro"},
        "--container-image=/images/h.sqsh --container-mounts=RUN:RUN,/data:/data:ro --container-workdir=RUN python3 -m",
    ),
    "apptainer": (
        {"HOPESCALE_CONTAINER": "h.sif", "HOPESCALE_RUNTIME": "apptainer", "SLURM_GPUS_ON_NODE": "2"},
        "apptainer exec --pwd RUN --nv --bind RUN:RUN h.sif python3 -m torch.distributed.run",
    ),
    "podman": (
        {"HOPESCALE_CONTAINER": "h:1", "HOPESCALE_RUNTIME": "podman", "HOPESCALE_MOUNTS": "/data:/data"},
        "podman run --rm --network host --ipc host --user UID --workdir RUN --volume RUN:RUN --volume /data:/data ENV "
        "--entrypoint python3 h:1 -m torch.distributed.run",
    ),
}


@pytest.mark.parametrize("runtime", list(CONTAINERS))
def test_the_command_of_each_container_runtime(job: Job, tmp_path: Path, runtime: str) -> None:
    env, expected = CONTAINERS[runtime]
    shown = job(env={**env, "HOPESCALE_DRY_RUN": "1"})
    assert shown.returncode == 0, shown.stderr
    words = shlex.split(shown.stdout)
    variables = [f"--env {words[at + 1]}" for at, word in enumerate(words) if word == "--env"]
    text = " ".join(words).replace(str(tmp_path / "run"), "RUN").replace(f"{os.getuid()}:{os.getgid()}", "UID")
    text = text.replace(" ".join(variables), "ENV") if variables else text
    assert expected in text
    assert not calls(tmp_path, "srun")
    assert {"--env SLURM_JOB_ID", "--env OMP_NUM_THREADS"} <= set(variables) or runtime != "podman"


def test_what_cannot_be_started_is_told(job: Job, tmp_path: Path) -> None:
    assert (
        "must be pyxis, apptainer, podman or docker"
        in job(env={"HOPESCALE_CONTAINER": "x", "HOPESCALE_RUNTIME": "lxc"}).stderr
    )
    assert "not in a Slurm job" in complaint("run")
    assert "RUN is missing" in complaint()


@pytest.mark.parametrize(
    ("state", "code", "goes_on", "left"),
    [
        ("running", 0, "1", False),
        ("running", 0, "0", True),
        ("preempted", 75, "1", False),
        ("failed", 72, "1", True),
    ],
)
def test_entries_of_a_job_that_waits_go_and_those_of_one_that_failed_stay(
    job: Job, tmp_path: Path, state: str, code: int, goes_on: str, left: bool
) -> None:
    folder = tmp_path / "targets"
    folder.mkdir()
    own, others = ["a-job42-start000000-0.json", "b-job42-start000000-1.json"], ["a-job421-start000000-0.json"]
    for name in (*own, *others):
        (folder / name).touch()
    job(outcome=status(state, code), env={"HOPESCALE_DISCOVERY": str(folder), "HOPESCALE_REQUEUE": goes_on})
    assert sorted(p.name for p in folder.iterdir()) == sorted([*others, *(own if left else [])])


def test_nodes_are_told_where_they_are_where_their_names_do_not_say_so(job: Job) -> None:
    # What stands for the first node's address is this machine, where each of them would be reached at it.
    shown = job(nodes=2, env={"HOPESCALE_HEAD": "127.0.1.7", "HOPESCALE_DRY_RUN": "1"})
    assert shown.returncode == 2
    shown = job(
        nodes=2, env={"HOPESCALE_HEAD": "0x7f000107", "HOPESCALE_PYTHON": sys.executable, "HOPESCALE_DRY_RUN": "1"}
    )
    words = shlex.split(shown.stdout)
    begin, end = words.index("bash"), words.index(sys.executable, words.index(sys.executable) + 1)
    # What each node runs, with its own number.
    for node, host in (("0", "1"), ("1", "0")):
        wrapped = [*words[begin:end], "printenv", "PET_RDZV_CONF", "PET_LOCAL_ADDR"]
        environment = {"PATH": os.environ["PATH"], "SLURM_NODEID": node}
        told = subprocess.run(wrapped, env=environment, capture_output=True, text=True, check=True).stdout
        assert told.splitlines()[0] == f"is_host={host}"
        assert told.splitlines()[1].startswith("127.")
    assert "bash" not in shlex.split(job(nodes=2, env={"HOPESCALE_DRY_RUN": "1"}).stdout)
