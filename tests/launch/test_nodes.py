"""launch/gpu_node.sh and launch/slurm.sbatch: what they hand to `lvlm` and to SLURM."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.launch.stubs import LAUNCH, program

WORDS = ("--config", "llava15_align", "--workdir", "/shared/align", "--config.name=a 'b' $c\\")
TELLS = "#!/usr/bin/env bash\nenv | grep -E '^(JAX_|LVLM_|SRUN_)' | sort\n"
SRUN = """#!{python}
import os, subprocess, sys
first = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-"))
job = {{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}}
tasks = [
    subprocess.Popen(sys.argv[first:], env=os.environ | job | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""
"""Two tasks on this machine, with the variables that SLURM sets and JAX reads (srun(1), output environment)."""


def test_one_machine_is_one_process_that_joins_nobody(stubs, tmp_path):
    done = stubs.run("gpu_node.sh", *WORDS)
    assert (done.returncode, stubs.calls) == (0, [["lvlm", "train", *WORDS]])
    assert stubs.run("gpu_node.sh", "x", LVLM=program(tmp_path / "lvlm", TELLS)).stdout == "JAX_PLATFORMS=cuda\n"


def test_of_several_machines_each_says_which_it_is(stubs, tmp_path):
    group = {"NODES": 2, "NODE": 1, "COORDINATOR": "node0:8476"}
    assert stubs.run("gpu_node.sh", *WORDS, **group).returncode == 0
    assert stubs.calls == [["lvlm", "train", *WORDS]]
    done = stubs.run("gpu_node.sh", "x", LVLM=program(tmp_path / "lvlm", TELLS), **group)
    assert done.stdout.splitlines() == [
        "JAX_COORDINATOR_ADDRESS=node0:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PLATFORMS=cuda",
        "JAX_PROCESS_ID=1",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"NODES": 2}, "NODE: which of the 2 machines is this?"),
        ({"NODES": 2, "NODE": 1}, "COORDINATOR: host and port of machine 0"),
    ],
)
def test_what_is_missing_is_named(given, message, stubs):
    done = stubs.run("gpu_node.sh", *WORDS, **given)
    assert done.returncode != 0
    assert message in done.stderr
    assert stubs.calls == []


def test_slurm_starts_every_task_with_every_word(stubs, tmp_path):
    done = stubs.run("slurm.sbatch", *WORDS, SLURM_CPUS_PER_TASK=12)
    assert (done.returncode, done.stderr) == (0, "")
    assert stubs.calls == [["srun", "--kill-on-bad-exit=1", "--label", "lvlm", "train", *WORDS]]
    program(stubs.bin / "srun", TELLS)
    told = stubs.run("slurm.sbatch", "x", SLURM_CPUS_PER_TASK=12).stdout.splitlines()
    assert told == ["JAX_PLATFORMS=cuda", "LVLM_DISTRIBUTED=1", "SRUN_CPUS_PER_TASK=12"]


def test_slurm_gets_a_task_for_each_gpu_and_time_to_save():
    head, _, body = (LAUNCH / "slurm.sbatch").read_text().partition("\nset -euo")
    assert "\n#SBATCH" not in body  # sbatch reads none after the first command
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", head, re.MULTILINE))
    assert len(options) == head.count("\n#SBATCH ")
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@300"  # to the steps, not to the batch shell (sbatch(1))
    assert "requeue" in options
    assert options["open-mode"] == "append"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_jax_finds_the_tasks_that_slurm_started(stubs, tmp_path):
    program(stubs.bin / "srun", SRUN.format(python=sys.executable))
    text = Path(__file__).with_name("stand_in.py").read_text()
    stand_in = program(tmp_path / "stand_in", f"#!{sys.executable}\n{text}")
    done = stubs.run("slurm.sbatch", *WORDS, JAX_PLATFORMS="cpu", LVLM=stand_in)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = sorted(map(json.loads, re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)), key=lambda row: row["process"])
    common = {"total": 11, "devices": [1, 2], "words": ["train", *WORDS]}
    assert rows == [{"process": 0} | common, {"process": 1} | common]
