"""`lvlm train` killed with SIGKILL at a random step and started again: the bits of an undisturbed run."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax import params as trees
from lvlm_jax.checkpoint import load_params
from lvlm_jax.train.log import read_rows
from tests.e2e import story

ROOT = Path(__file__).parents[2]
STAGES = ("vision", "language", "align", "instruct")
STEPS = 40
NUMBERS = ("step", "loss", "lr", "grad_norm", "skipped")


def start(album, workdir):
    """The command, in a process of its own on one device."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(album / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = dict(os.environ, XLA_FLAGS="", PYTHONPATH=str(ROOT), **cache)
    words = ["--config", f"{Path(story.__file__)}:{album}", "--workdir", str(workdir)]
    line = [sys.executable, "-m", "lvlm_jax.cli", "train", *words]
    return subprocess.Popen(line, env=environment, cwd=workdir.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out.decode()


def kill_at(process, file, rows):
    """SIGKILL as soon as the stage has written so many rows."""
    deadline = time.time() + 300
    while not (file.exists() and file.read_bytes().count(b"\n") >= rows):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.time() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -9


def result(workdir):
    """All bits of every stage's parameters, and every stage's curve."""
    bits, curves = {}, {}
    for name in STAGES:
        flat = trees.flatten(load_params(workdir / name / "params"))
        bits[name] = {path: np.asarray(leaf).tobytes() for path, leaf in flat.items()}
        curves[name] = [tuple(row[n] for n in NUMBERS) for row in read_rows(workdir / name / "metrics.jsonl")]
    return bits, curves


@pytest.mark.slow
def test_three_kills_in_three_stages(tmp_path):
    album, whole, killed = (tmp_path / name for name in ("album", "whole", "killed"))
    story.write_album(album)
    for workdir in (whole, killed):
        workdir.mkdir()
    finish(start(album, whole))
    wanted, curves = result(whole)
    assert [row[0] for row in curves["instruct"]] == list(range(1, STEPS + 1))

    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    for place in sorted(chance.sample(range(len(STAGES)), 3)):
        stage, step = STAGES[place], chance.randint(1, STEPS - 1)
        print(f"seed {seed}: killing {stage} after step {step}")
        kill_at(start(album, killed), killed / stage / "metrics.jsonl", step)
    finish(start(album, killed))
    got, again = result(killed)
    assert again == curves
    assert got == wanted
