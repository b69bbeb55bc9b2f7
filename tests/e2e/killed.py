"""`lvlm train` on the album of `story.py` as processes that a test kills, and all the bits that a run leaves."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lvlm_jax import params as trees
from lvlm_jax.checkpoint import load_params
from lvlm_jax.train.log import read_rows
from tests.e2e import story

ROOT = Path(__file__).parents[2]
STAGES = ("vision", "language", "align", "instruct")
STEPS = 40
NUMBERS = ("step", "loss", "lr", "grad_norm", "skipped")


def start(album, workdir):
    """The command, in a process of its own, as a user gives it: a device a core, compiled programs in the workdir."""
    environment = dict(os.environ, XLA_FLAGS="", PYTHONPATH=str(ROOT))
    words = ["--config", f"{Path(story.__file__)}:{album}", "--workdir", str(workdir)]
    line = [sys.executable, "-m", "lvlm_jax.cli", "train", *words]
    return subprocess.Popen(line, env=environment, cwd=workdir.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def new_workdir(workdir, compiled=None):
    """A workdir in which nothing has run, but what an earlier run in `compiled` compiled need not be compiled again."""
    workdir.mkdir()
    if compiled is not None:
        shutil.copytree(compiled / "cache" / "compiled", workdir / "cache" / "compiled")
    return workdir


def finish(process):
    """Waits for the end, which must be a good one."""
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out.decode()


def wait_until(true, process, step=0.002):
    """Waits for `true()` while the process runs."""
    deadline = time.time() + 300
    while not true():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.time() < deadline
        time.sleep(step)


def kill(process):
    """SIGKILL."""
    process.kill()
    process.communicate()
    assert process.returncode == -9


def rows(file):
    """Lines of a stage's ``metrics.jsonl`` so far."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def result(workdir):
    """All bits of every stage's parameters, and every stage's curve."""
    bits, curves = {}, {}
    for name in STAGES:
        flat = trees.flatten(load_params(workdir / name / "params"))
        bits[name] = {path: np.asarray(leaf).tobytes() for path, leaf in flat.items()}
        curves[name] = [tuple(row[n] for n in NUMBERS) for row in read_rows(workdir / name / "metrics.jsonl")]
    return bits, curves
