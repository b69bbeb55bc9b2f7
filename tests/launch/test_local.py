"""launch/local.sh: real processes on this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.stubs import LAUNCH, ROOT, program

WORDS = ("--config", "quickstart:tiny", "--workdir", "runs/two", "--config.name=a 'b' $c\\")
WAITS = """#!/usr/bin/env bash
trap 'sleep 0.5; echo saved; exit 0' TERM
trap 'echo interrupted; exit 1' INT
echo ready
while true; do sleep 0.1; done
"""
"""Saves and ends when asked, as lvlm does."""
MEET = 'cd "${{0%/*}}"; touch "here$JAX_PROCESS_ID"; until [ -e here{last} ] && [ -e here0 ]; do sleep 0.1; done; '
"""What follows runs in no process before the first and the last have come so far."""


@pytest.fixture
def lvlm(tmp_path):
    """Writes the program that is started, a bash script."""
    return lambda text: program(tmp_path / "lvlm", text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")


@pytest.fixture
def started(stubs):
    """Starts local.sh in a process group of its own; what is left of it ends with the test."""
    running = []

    def start(*words, **environment):
        process = subprocess.Popen(
            [str(LAUNCH / "local.sh"), *words],
            cwd=ROOT,
            env=stubs.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_hear_signals,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _hear_signals() -> None:
    """What nohup or a shell's `&` has ignored stays ignored in every child, and a shell cannot trap it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def read_until(process, text: str, times: int) -> str:
    """Output up to the line in which `text` came for the last of `times` times."""
    seen = ""
    while seen.count(text) < times:
        line = process.stdout.readline()
        assert line, f"ended after {seen!r}"
        seen += line
    return seen


def test_each_process_is_told_who_it_is_and_gets_every_word(stubs, lvlm):
    tells = lvlm(
        'printf "%s|" "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES" "$JAX_PLATFORMS" "$JAX_COORDINATOR_ADDRESS" "$@"; echo'
    )
    done = stubs.run("local.sh", "3", *WORDS, LVLM=tells)
    assert (done.returncode, done.stderr) == (0, "")
    rows = sorted(done.stdout.splitlines())
    coordinator = re.search(r"127\.0\.0\.1:\d+", rows[0]).group()
    words = "|".join(["cpu", coordinator, "train", *WORDS])
    assert rows == [f"[{i}] {i}/3|{words}|" for i in range(3)]
    with socket.create_server(("127.0.0.1", int(coordinator.partition(":")[2]))):
        pass  # it was free, and is again


def test_port_and_devices_can_be_given(stubs, lvlm):
    done = stubs.run(
        "local.sh", "1", "x", PORT=23456, DEVICES=4, LVLM=lvlm('echo "$JAX_COORDINATOR_ADDRESS $XLA_FLAGS"')
    )
    assert done.stdout.split() == ["[0]", "127.0.0.1:23456", "--xla_force_host_platform_device_count=4"]


def test_flags_of_the_user_stay(stubs, lvlm):
    done = stubs.run("local.sh", "1", "x", XLA_FLAGS="--xla_a", DEVICES=4, LVLM=lvlm('echo "$XLA_FLAGS"'))
    assert done.stdout == "[0] --xla_a --xla_force_host_platform_device_count=4\n"


@pytest.mark.parametrize(
    ("words", "environment", "named"),
    [
        (["two", "--config", "x"], {}, "N=two: how many processes?"),
        (["--config", "x"], {}, "N=--config: how many processes?"),
        (["0", "--config", "x"], {}, "N=0: how many processes?"),
        (["2", "--config", "x"], {"DEVICES": "many"}, "DEVICES=many: how many devices"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(words, environment, named, stubs):
    done = stubs.run("local.sh", *words, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch/local.sh: {named}")
    assert stubs.calls == []


def test_when_one_fails_the_others_say_so_and_its_status_is_the_scripts(stubs, lvlm):
    fails = 'if [ "$JAX_PROCESS_ID" = 1 ]; then echo broken >&2; touch gone; exit 3; fi; '
    lost = "until [ -e gone ]; do sleep 0.1; done; sleep 0.5; echo lost; exit 75"
    done = stubs.run("local.sh", "3", "x", LVLM=lvlm(MEET.format(last=2) + fails + lost))
    assert done.returncode == 3
    assert done.stderr == "launch/local.sh: process 1 ended with status 3\n"
    assert sorted(done.stdout.splitlines()) == ["[0] lost", "[1] broken", "[2] lost"]


def test_who_does_not_end_in_time_is_ended(stubs, lvlm):
    rest = 'if [ "$JAX_PROCESS_ID" = 0 ]; then exit 2; fi; while true; do sleep 0.1; done'
    began = time.monotonic()
    done = stubs.run("local.sh", "2", "x", GRACE=2, LVLM=lvlm(MEET.format(last=1) + rest))
    assert done.returncode == 2
    assert done.stderr == "launch/local.sh: process 0 ended with status 2\n"
    assert 1 <= time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_all_to_save(number, started, lvlm):
    process = started("2", "x", LVLM=lvlm(WAITS))
    read_until(process, "ready", times=2)
    process.send_signal(number)
    rest = process.communicate(timeout=20)[0]
    assert (process.returncode, sorted(rest.splitlines())) == (0, ["[0] saved", "[1] saved"])


def test_ctrl_c_at_a_terminal_reaches_the_processes_once(started, lvlm):
    process = started("2", "x", LVLM=lvlm(WAITS))
    read_until(process, "ready", times=2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everything in the foreground's process group
    rest = process.communicate(timeout=20)[0]
    assert (process.returncode, sorted(rest.splitlines())) == (0, ["[0] saved", "[1] saved"])


def test_a_second_signal_ends_them_at_once(started, lvlm):
    process = started("2", "x", LVLM=lvlm('trap "echo asked" TERM; echo ready; while true; do sleep 0.1; done'))
    read_until(process, "ready", times=2)
    process.send_signal(signal.SIGTERM)
    read_until(process, "asked", times=2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL


def test_nothing_is_left_behind(stubs, lvlm, tmp_path):
    worker = tmp_path / "worker"
    done = stubs.run("local.sh", "1", "x", LVLM=lvlm(f'sleep 300 & echo $! >"{worker}"; exit 3'))
    assert done.returncode == 3
    state = Path(f"/proc/{worker.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_of_jax_add_up(devices, stubs, tmp_path):
    text = Path(__file__).with_name("stand_in.py").read_text()
    stand_in = program(tmp_path / "stand_in", f"#!{sys.executable}\n{text}")
    done = stubs.run("local.sh", "2", *WORDS, DEVICES=devices, LVLM=stand_in)
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(re.findall(r"^\[(\d)\] (\{.*\})$", done.stdout, re.MULTILINE))
    for process, row in told.items():
        wanted = {"process": int(process), "total": 11, "devices": [devices, 2 * devices], "words": ["train", *WORDS]}
        assert json.loads(row) == wanted
    assert sorted(told) == ["0", "1"]
