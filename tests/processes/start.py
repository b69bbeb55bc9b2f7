"""Starts `lvlm train` as several processes of this machine and reads what they leave."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lvlm_jax import params as trees
from lvlm_jax.checkpoint import load_params
from lvlm_jax.evaluate import run as evaluations
from lvlm_jax.train.log import read_rows
from tests.processes import recipe

ROOT = Path(__file__).parents[2]
NUMBERS = ("step", "loss", "lr", "grad_norm", "skipped")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Processes:
    """`count` processes of one run with `devices` CPU devices each, their output in files of `folder`.

    words: more of the command for all. own: of one process alone, by its number.
    """

    def __init__(self, album, workdir, count, devices=1, words=(), own=None):
        self.logs = [workdir.parent / f"{workdir.name}.{i}.log" for i in range(count)]
        port, own = free_port(), own or {}
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(album / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = dict(os.environ, XLA_FLAGS=flags, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", **cache)
        line = [sys.executable, "-m", "lvlm_jax.cli", "train", "--config", f"{recipe.__file__}:{album}"]
        line += ["--workdir", str(workdir), *words]
        self.running = []
        for i, log in enumerate(self.logs):
            group = ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process", str(i)]
            with log.open("w") as out:
                whole = [*line, *(group if count > 1 else ()), *own.get(i, ())]
                self.running.append(
                    subprocess.Popen(whole, env=environment, cwd=workdir.parent, stdout=out, stderr=out)
                )

    def ends(self, seconds=300):
        """The exit status of each, within `seconds` of now; those still there then are killed and the test fails."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.running]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {seconds} s:\n{self.said()}") from None
        finally:
            for process in self.running:
                process.kill()

    def said(self, i=None):
        """What one process printed, or all."""
        return "\n".join(log.read_text(errors="replace") for log in (self.logs if i is None else [self.logs[i]]))

    def after(self, file, rows, seconds=300):
        """Waits until the run has written so many rows."""
        deadline = time.monotonic() + seconds
        while not (file.exists() and file.read_bytes().count(b"\n") >= rows):
            assert all(process.poll() is None for process in self.running), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)
        return self


def result(workdir):
    """({path: trained weight}, the curve, what the model said)."""
    flat = trees.flatten(load_params(workdir / "instruct" / "params"))
    curve = [tuple(row[n] for n in NUMBERS) for row in read_rows(workdir / "instruct" / "metrics.jsonl")]
    said = evaluations.load(workdir / "evaluation" / "after_instruct").samples
    assert said
    return {path: np.asarray(leaf) for path, leaf in flat.items()}, curve, [row["prediction"] for row in said]
