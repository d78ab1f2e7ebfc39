"""The Slurm that tests run on: nodes are like machines of their own, faults are real, and nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.slurm_nodes import SCRIPT, SlurmError, SlurmNodes
from tests.user_process import REPO_ROOT, run_as_user

pytestmark = [pytest.mark.integration, pytest.mark.requires("slurm")]

KINDS = ("ipc", "mnt", "net", "pid", "uts")

CALL = f"""
import os, socket, sys, time

def say(text):
    print(f"{{socket.gethostname()}} {{text}}\\n", end="", flush=True)

head, then = sys.argv[1:]
say("lives in " + " ".join(os.readlink(f"/proc/self/ns/{{kind}}") for kind in {KINDS}))
if os.environ["SLURM_PROCID"] == "0":
    with socket.create_server(("", 29400)) as server:
        server.settimeout(60)
        call, (address, _) = server.accept()
    say(f"is called from {{address}}")
    call.settimeout(None)
    while call.recv(100):
        pass
    say("is told goodbye")
else:
    for _ in range(600):
        try:
            call = socket.create_connection((head, 29400), timeout=10)
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    say(f"calls {{call.getpeername()[0]}}")
    if then == "stay":
        time.sleep(600)
    call.close()
"""
"""The second rank calls the first by the name of its node, and hangs up or stays."""


@pytest.fixture
def calling(slurm: SlurmNodes) -> str:
    """The line of a batch script that runs CALL on all nodes; what is to be done then comes behind it."""
    (slurm.jobs / "call.py").write_text(CALL)
    return f'srun {sys.executable} call.py "$(scontrol show hostnames | head -n 1)"'


def test_nodes_have_names_addresses_and_namespaces_of_their_own_and_reach_each_other(slurm, calling) -> None:
    job = slurm.submit("--nodes=2", "--ntasks-per-node=1", script=f"#!/bin/bash\n{calling} leave\n")
    slurm.wait(job, "COMPLETED")
    output = slurm.output(job)
    assert "n1 is called from 10.77.0.12\n" in output
    assert "n2 calls 10.77.0.11\n" in output
    assert "n1 is told goodbye\n" in output
    lives = dict(re.findall(r"^(n\d) lives in (.*)$", output, re.MULTILINE))
    here = {os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS}
    assert lives.keys() == {"n1", "n2"}
    assert len({*lives["n1"].split(), *lives["n2"].split(), *here}) == 3 * len(KINDS)


def test_a_signal_reaches_the_trap_of_the_batch_shell_which_can_requeue_its_job(slurm: SlurmNodes) -> None:
    script = """#!/bin/bash
    echo "start ${SLURM_RESTART_COUNT:-0}"
    [ -z "$SLURM_RESTART_COUNT" ] || exit 0
    trap 'echo trapped; scontrol requeue "$SLURM_JOB_ID"' USR1
    sleep 600 &
    echo ready
    while kill -0 $! 2>/dev/null; do wait; done
    """
    job = slurm.submit("--open-mode=append", script=script)
    slurm.wait_for_output(job, "^ready$")
    slurm.signal(job, "USR1")
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    starts = [line for line in slurm.output(job).splitlines() if re.match("start|trapped", line)]
    assert starts == ["start 0", "trapped", "start 1"]


def test_an_urgent_job_sends_those_in_its_way_the_signal_they_asked_for_and_takes_their_nodes(
    slurm: SlurmNodes,
) -> None:
    script = """#!/bin/bash
    trap 'echo trapped; exit 0' USR1
    sleep 600 &
    echo ready
    wait
    """
    job = slurm.submit("--nodes=3", "--exclusive", "--signal=B:USR1@60", script=script)
    slurm.wait_for_output(job, "^ready$")
    urgent = slurm.submit("--partition=urgent", "--nodes=1", "--wrap=true")
    slurm.wait_for_output(job, "^trapped$")
    slurm.wait(urgent, "COMPLETED")
    slurm.wait(job, "COMPLETED")


def test_a_job_of_a_crashed_node_is_requeued_on_the_others_and_the_node_comes_back(slurm: SlurmNodes, calling) -> None:
    script = f"""#!/bin/bash
    echo "start ${{SLURM_RESTART_COUNT:-0}} on" $(scontrol show hostnames)
    [ -n "$SLURM_RESTART_COUNT" ] || {calling} stay
    """
    job = slurm.submit("--nodes=2", "--ntasks-per-node=1", "--open-mode=append", script=script)
    slurm.wait_for_output(job, "n2 calls")
    slurm.crash(2)
    with pytest.raises(SlurmError, match="n2 is off already"):
        slurm.crash(2)
    assert slurm.wait(job, "COMPLETED", timeout=120)["Restarts"] == "1"
    output = slurm.output(job)
    assert re.findall("^start.*$", output, re.MULTILINE) == ["start 0 on n1 n2", "start 1 on n1 n3"]
    # A machine that has lost its power closes no connection.
    assert "goodbye" not in output
    slurm.start(2)
    slurm.wait_for_nodes(2, state="idle")
    slurm.wait(slurm.submit("--nodes=3", "--wrap=srun true"), "COMPLETED")


def test_a_node_that_is_cut_off_goes_on_and_is_reached_again_when_mended(slurm: SlurmNodes) -> None:
    script = "#!/bin/bash\nuntil [ -e enough ]; do echo beat; sleep 0.1; done\n"
    job = slurm.submit("--nodelist=n2", script=script)

    def is_reached(_: object = None) -> bool:
        return slurm.run("timeout", "1", "bash", "-c", "</dev/tcp/n2/6818").returncode == 0

    slurm.wait_for_output(job, "beat")
    assert is_reached()
    slurm.cut(2)
    assert not is_reached()
    beats = len(slurm.output(job))
    slurm.wait(job, lambda _: len(slurm.output(job)) > beats + 10)
    slurm.mend(2)
    slurm.wait(job, is_reached)
    (slurm.jobs / "enough").touch()
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "0"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--partition=nowhere"], "invalid partition specified: nowhere"),
        (["--nodes=9"], "Node count specification invalid"),
        (["--time=2:00:00"], "Requested time limit is invalid"),
        (["--partition=long", "--nodes=2"], "Node count specification invalid"),
        (["--partition=restricted"], "Invalid account or account/partition combination"),
        (["--gpus-per-node=5"], "Requested node configuration is not available"),
    ],
)
def test_refusals_are_told_in_the_words_of_slurm(slurm_cluster: SlurmNodes, arguments: list[str], says: str) -> None:
    with pytest.raises(SlurmError, match=says):
        slurm_cluster.submit(*arguments, "--wrap=true")


def test_the_long_partition_allows_what_the_default_one_does_not(slurm: SlurmNodes) -> None:
    slurm.wait(slurm.submit("--partition=long", "--time=2:00:00", "--wrap=true"), "COMPLETED")


def test_a_job_is_given_the_gpus_that_it_asks_for(slurm: SlurmNodes) -> None:
    job = slurm.submit("--gpus-per-node=2", "--wrap=srun printenv CUDA_VISIBLE_DEVICES")
    slurm.wait(job, "COMPLETED")
    assert slurm.output(job) == "0,1\n"


def test_waiting_ends_with_the_job_and_tells_what_it_printed(slurm: SlurmNodes) -> None:
    job = slurm.submit("--wrap=echo 'out of ideas'; exit 3")
    with pytest.raises(SlurmError, match=r"ended without TIMEOUT: JobState=FAILED .* ExitCode=3:0 (.|\n)*out of ideas"):
        slurm.wait(job, "TIMEOUT")
    held = slurm.submit("--hold", "--wrap=true")
    with pytest.raises(SlurmError, match=r"within 0.1 s did not reach COMPLETED: JobState=PENDING "):
        slurm.wait(held, "COMPLETED", timeout=0.1)


def test_training_by_torchrun_meets_over_the_nodes_own_addresses(slurm: SlurmNodes) -> None:
    (slurm.jobs / "reduce.py").write_text(
        """
import socket
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
print(f"{socket.gethostname()} total {total}\\n", end="", flush=True)
dist.destroy_process_group()
"""
    )
    # In quotes that keep variables of a task from being read on the node of the batch script.
    script = f"""#!/bin/bash
    export HEAD_NODE=$(scontrol show hostnames | head -n 1)
    srun --kill-on-bad-exit=1 bash -c '{sys.executable} -m torch.distributed.run \\
      --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 1 --rdzv-backend c10d \\
      --rdzv-id "$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" --rdzv-endpoint "$HEAD_NODE:29400" reduce.py'
    """
    job = slurm.submit("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", script=script)
    slurm.wait(job, "COMPLETED", timeout=200)
    assert sorted(re.findall(r"^n\d total .*$", slurm.output(job), re.MULTILINE)) == ["n1 total 3", "n2 total 3"]


def namespaces_of(pid: int) -> set[str]:
    """None of a process that is gone."""
    try:
        return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in KINDS}
    except OSError:
        return set()


def naming(folder: Path) -> list[psutil.Process]:
    """The processes whose command names a folder: those that a cluster there consists of, without its jobs."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def living_in_cluster(folder: Path) -> list[psutil.Process]:
    """All processes of a cluster, jobs too, by the namespaces it has made."""
    made = set[str]().union(*(namespaces_of(p.pid) for p in naming(folder))) - namespaces_of(os.getpid())
    return [p for p in psutil.process_iter() if made & namespaces_of(p.pid)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_ends(processes: list[psutil.Process]) -> None:
    """Those that do not end are killed, and the test fails."""
    deadline = time.monotonic() + 30
    while left := [p for p in processes if is_alive(p)]:
        if time.monotonic() > deadline:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            pytest.fail(f"still there: {left}")
        time.sleep(0.05)


def test_a_second_cluster_lives_beside_the_first_and_leaves_nothing(slurm: SlurmNodes, tmp_path: Path) -> None:
    links = psutil.net_if_addrs().keys()
    with SlurmNodes(tmp_path / "second", nodes=1) as second:
        job = second.submit("--wrap=echo ready; setsid sleep 601 & sleep 602")
        second.wait_for_output(job, "ready")
        processes = living_in_cluster(tmp_path)
        # The job and what it has left behind are found too.
        assert {"sleep 601", "sleep 602"} <= {" ".join(p.cmdline()) for p in processes}
        assert slurm.sinfo().keys() == {"n1", "n2", "n3"}
        # Its bridge and cables are its own.
        assert not {"br0", "n1"} & (psutil.net_if_addrs().keys() - links)
        assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert [p for p in processes if is_alive(p)] == []
    assert naming(tmp_path) == []
    slurm.wait(slurm.submit("--nodes=3", "--wrap=srun true"), "COMPLETED")


def test_a_cluster_ends_when_the_process_that_holds_it_is_killed(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from tests.slurm_nodes import SlurmNodes

with SlurmNodes(Path({str(tmp_path)!r}), nodes=1):
    print("up", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        processes = living_in_cluster(tmp_path)
        assert "slurmctld" in {p.name() for p in processes}
        holder.kill()
        wait_for_ends(processes)


def script(folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_as_user(["bash", str(SCRIPT), command, str(folder), *arguments], folder.parent)


def test_a_cluster_that_was_left_up_makes_room_for_the_next_in_its_folder(tmp_path: Path) -> None:
    assert script(tmp_path, "up", "1").returncode == 0
    left = living_in_cluster(tmp_path)
    try:
        assert "slurmctld" in {p.name() for p in left}
        assert script(tmp_path, "up", "2").returncode == 0
        wait_for_ends(left)
        assert script(tmp_path, "run", "sinfo", "--noheader", "--format=%D", "--partition=ci").stdout == "2\n"
        next_ones = living_in_cluster(tmp_path)
    finally:
        assert script(tmp_path, "down").returncode == 0
    wait_for_ends(next_ones)


@pytest.mark.parametrize(
    ("folder", "words", "says"),
    [
        ("nothing", ["run", "sinfo"], "no cluster is up in"),
        ("nothing", ["crash", "1"], "no cluster is up in"),
        ("a b", ["up", "1"], r"a b: slurm.conf takes no other characters than"),
        ("new", ["up", "none"], r"slurm_cluster.sh up DIR N "),
        ("new", ["up"], r"slurm_cluster.sh up DIR N "),
        ("new", ["climb", "1"], r"slurm_cluster.sh up DIR N "),
    ],
)
def test_mistakes_of_the_command_line_are_told(tmp_path: Path, folder: str, words: list[str], says: str) -> None:
    ended = script(tmp_path / folder, *words)
    assert ended.returncode in (1, 2)
    assert says in ended.stderr
    assert not (tmp_path / folder).exists()


@pytest.mark.parametrize("name", ["dev", "log", "run", "spool", "state"])
def test_a_folder_of_somebody_else_is_not_emptied(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    ended = script(tmp_path, "up", "1")
    script(tmp_path, "down")
    assert ended.returncode == 1
    assert f"it has a folder {name} that is not of a cluster, choose a new folder" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_faults_of_nodes_that_cannot_have_them_are_refused(slurm_cluster: SlurmNodes) -> None:
    with pytest.raises(SlurmError, match="has no node n4"):
        slurm_cluster.crash(4)
    with pytest.raises(SlurmError, match="n1 is on already"):
        slurm_cluster.start(1)


def test_a_plugin_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    nodes = SlurmNodes(tmp_path, nodes=1, spank_plugin=tmp_path / "plugin.so")
    with pytest.raises(SlurmError, match=r"plugin\.so: there is no such file"):
        nodes.__enter__()


def test_the_installer_does_nothing_where_all_is_there_and_else_says_what_to_install(tmp_path: Path) -> None:
    installer = SCRIPT.with_name("install_slurm.sh")
    assert run_as_user(["bash", str(installer)], tmp_path).stderr == ""
    # Where neither Slurm nor apt-get can be found.
    for program in ("basename", "dirname", "id", "sort"):
        (tmp_path / program).symlink_to(shutil.which(program) or program)
    ended = run_as_user(["env", f"PATH={tmp_path}", shutil.which("bash") or "bash", str(installer)], tmp_path)
    assert ended.returncode == 2
    assert "apt-get install --no-install-recommends" in ended.stderr
    assert "slurm-client" in ended.stderr
