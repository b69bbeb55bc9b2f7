"""launch/README.md: every line that a reader copies runs, against stand-ins, and trains what it says."""

import os
import re
import shlex
import subprocess

import pytest
import yaml

from lvlm_jax import cli, recipe
from tests.launch.stubs import LAUNCH, NAMES, ROOT, SCRIPTS, program
from tests.launch.test_gke import MACHINES

README = (LAUNCH / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
SBATCH = """#!/usr/bin/env bash
until [[ $1 == *.sbatch ]]; do shift; done
exec "$@"
"""
SRUN = """#!/usr/bin/env bash
until [[ $1 != --* ]]; do shift; done
exec "$@"
"""
"""A cluster of this machine alone: what is submitted runs, once."""


def trained(calls: list[list[str]]) -> list[list[str]]:
    """The words of every `lvlm train` that was started, here or by ssh or in a container."""
    found = [call[2:] for call in calls if call[:2] == ["lvlm", "train"]]
    for call in calls:
        command = next((word.removeprefix("--command=") for word in call if word.startswith("--command=")), "")
        remote = re.search(r"(?:bin/lvlm train|gke/train\.sh)(.*?)(?: >>|$)", command)
        found += [shlex.split(remote[1])] if remote else []
    return found


@pytest.mark.parametrize("block", BLOCKS, ids=[block.split()[0] for block in BLOCKS])
def test_every_line_runs(block, stubs):
    program(stubs.bin / "sbatch", SBATCH)
    program(stubs.bin / "srun", SRUN)
    stubs.answer("gcloud compute tpus queued-resources list", "", "ACTIVE")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=ROOT,
        env=stubs.environment(POLL=0),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in block.splitlines() if "--workdir" in line]
    runs = trained(stubs.calls)
    assert {" ".join(words) for words in runs} == {line[line.index("--config") :] for line in lines}
    for words in runs:
        args, rest = cli._parser().parse_known_args(["train", *words])
        assert args.workdir
        assert recipe.load(args.config, rest).run


def test_every_script_and_program_has_its_line():
    for script in SCRIPTS:
        name = str(script.relative_to(ROOT))
        if name != "launch/gke/train.sh":  # the image's
            assert any(name in line for line in LINES), name
    assert "launch/gke/train.sh" in (LAUNCH / "gke" / "Dockerfile").read_text()
    commands = re.search(r"no command \$1; they are ([\w, ]+)", (LAUNCH / "tpu_vm.sh").read_text())[1].split(", ")
    shown = re.findall(r"launch/tpu_vm\.sh (\w+)", "\n".join(LINES))
    assert set(commands) - set(shown) == {"status"}
    programs = {line.split()[0] for line in LINES if re.match("[a-z]+ ", line)} - {"export"}
    assert programs == {"docker", "gcloud", "kubectl", "sbatch", "xpk"} < set(NAMES)  # none of them the real one


def test_help_shows_the_lines_of_this_page():
    shown = []
    for script in SCRIPTS:
        head = script.read_text().partition("\nset -euo")[0].replace(" \\\n#", "")
        shown += re.findall(r"^#   ((?:[A-Z_]+=\S+ +|sbatch .*?)*launch/\S+ .*--config .*)$", head, re.MULTILINE)
    assert len(shown) == 6
    assert [example for example in shown if re.sub(" +", " ", example) not in LINES] == []


def test_the_manifest_trains_what_the_page_says():
    manifest = yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())
    assert f"jobset.sigs.k8s.io/jobset-name={manifest['metadata']['name']}," in README
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert f"--container {container['name']} " in README
    assert f"--tag {container['image']} ." in README
    assert any(line.endswith(shlex.join(container["args"])) for line in LINES)


def test_labels_of_the_table_are_those_of_the_api():
    rows = re.findall(r"^\| `([\w-]+)` \| \w+ \| ([\dx]+) \| (\d+) \| (\d+) \|$", README, re.MULTILINE)
    assert {name: int(chips) for name, _, _, chips in rows} == MACHINES
    for _, topology, machines, chips in rows:
        sizes = [int(size) for size in topology.split("x")]
        assert int(machines) * int(chips) == sizes[0] * sizes[1] * (sizes[2] if sizes[2:] else 1)


PLANS = re.findall(r"`(lvlm plan [^`]+)`", README)


@pytest.mark.parametrize("command", PLANS)
def test_plans_are_understood(command):
    args, rest = cli._parser().parse_known_args(shlex.split(command)[1:])
    assert args.command == "plan"
    assert recipe.load(args.config, rest).run


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert links
    assert [link for link in links if not os.path.exists(LAUNCH / link)] == []


def test_the_front_page_gives_lines_that_are_tested_here():
    front = re.findall(r"^launch/.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert front
    assert [line for line in front if line not in LINES] == []
