from __future__ import annotations

import os
import random
import string
import subprocess
from pathlib import Path

import pytest

from hopescale.config.compose import load_config, validate
from hopescale.config.schema import Config
from hopescale.errors import ConfigError
from hopescale.slurm.render import environment, header, render, settings_file
from hopescale.slurm.schema import seconds_of

RUN = Path("/shared/runs/a")


def config_of(*overrides: str) -> Config:
    return load_config(["data.path=/data", "run.name=a", *overrides])


def options_of(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_header_asks_for_what_is_configured() -> None:
    asked = ("partition=gpu", "account=lab", "qos=high", "nodes=4", "gpus_per_node=8", "time=1-12:00:00")
    config = config_of(*(f"cluster.{each}" for each in asked), "cluster.options=[--exclusive,'--mail-type=END']")
    options = options_of(render(config, RUN))
    assert options == {
        "job-name": "a",
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "nodes": "4",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "time": "1-12:00:00",
        "signal": "B:USR1@300",
        "requeue": "",
        "open-mode": "append",
        "output": "/shared/runs/a/logs/slurm-%j.out",
        "exclusive": "",
        "mail-type": "END",
    }


def test_ranks_on_cpus_ask_for_no_gpu() -> None:
    config = config_of("cluster.gpus_per_node=2", "parallel.device=cpu", "cluster.requeue=false")
    options = options_of(render(config, RUN))
    assert "gpus-per-node" not in options
    assert "no-requeue" in options
    assert environment(config)["HOPESCALE_RANKS"] == "2"


def test_scripts_are_bash_and_hold_their_body_once() -> None:
    script = render(config_of(), RUN)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert script.count("torch.distributed.run") == 1
    assert script.index("set -- /shared/runs/a") < script.index("set -euo pipefail")


@pytest.mark.parametrize("option", ["--nodes=3", "--wrap=x", "--output=x", "--no-requeue", "--time=5"])
def test_options_that_fields_are_there_for_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="is set by the fields"):
        header(config_of(f"cluster.options=['{option}']"), RUN)


@pytest.mark.parametrize("run", [Path("relative"), Path("/runs/a b"), Path("/runs/$(id)"), Path("/runs/a\nb")])
def test_folders_that_a_script_cannot_hold_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="must be an absolute path"):
        render(config_of(), run)


@pytest.mark.parametrize("text", ["a=b\nc=d", "a=b\r", "a=b\n", "a=b\u2028c"])
def test_settings_of_several_lines_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="line break"):
        settings_file(["train.steps=1", text])


def hostile(random_: random.Random) -> str:
    """A value that begins like a name and goes on like an attack."""
    pieces = ["$(touch CANARY)", "`touch CANARY`", "\ntouch CANARY\n", ">CANARY", "${IFS}", "#SBATCH --wrap=x", "%j"]
    pieces += ["../", "--", "\u2028", "é", "\0", *string.printable]
    count = random_.randint(1, 6)
    return random_.choice(["", "a", "gpu"]) + "".join(
        random_.choice([*pieces, *string.printable]) for _ in range(count)
    )


@pytest.mark.parametrize(
    "field",
    [
        "partition",
        "account",
        "qos",
        "time",
        "memory",
        "options",
        "container",
        "mounts",
        "python",
        "env_file",
        "run.name",
    ],
)
def test_hostile_values_are_refused_or_written_as_they_are(field: str, tmp_path: Path) -> None:
    tree = config_of().model_dump(mode="json")
    plain = render(validate(tree), RUN)
    rng, written, scripts = random.Random(field), 0, []
    for _ in range(950):
        value = hostile(rng)
        section = {"run": {**tree["run"], "name": value}} if field == "run.name" else {"cluster": {**tree["cluster"]}}
        if field != "run.name":
            section["cluster"] |= {field: [value] if field in ("options", "mounts") else value}
            if field == "mounts":
                section["cluster"]["container"] = "image"
        try:
            script = render(validate({**tree, **section}), RUN)
        except ConfigError:
            continue
        written += 1
        scripts.append(script)
        # As many header lines as for harmless values, or one more, and each of the script's lines as before.
        assert script.count("\n#SBATCH") - plain.count("\n#SBATCH") in (0, 1)
        assert script.partition("set -euo pipefail")[2] == plain.partition("set -euo pipefail")[2]
    # What is written is one assignment or comment a line: run up to the body, it leaves nothing.
    heads = "\n".join(script.partition("set -euo pipefail")[0] for script in scripts)
    path = {"PATH": os.environ["PATH"]}
    ran = subprocess.run(["bash"], input=heads, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:00:01", 3601),
        ("2-0", 172_800),
        ("1-12:30", 131_400),
        ("0-00:00:07", 7),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_a_job_that_would_begin_to_save_before_it_trains_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.time=5: is over before a job has trained"):
        load_config(["experiment=demo", "cluster.time='5'"])
    assert load_config(["experiment=demo", "cluster.time='6'"]).cluster.time == "6"


def test_a_home_in_the_name_of_python_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(["experiment=demo", "cluster.python='~/venv/bin/python'"])
    assert "export HOPESCALE_PYTHON=/home/somebody/venv/bin/python" in render(config, Path("/runs/a"))
