"""Runs of 2 and 4 real processes on this machine (gloo): the numbers of one, saves, and ends that are no hangs."""

import os
import signal

import jax
import numpy as np
import pytest

import lvlm_jax
from lvlm_jax import cli
from tests.e2e import story
from tests.processes.recipe import STEPS
from tests.processes.start import Processes, free_port, result

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

BOUND = 1e-5
"""Largest difference of a weight, and of a figure of the curve as a share, where gradients are summed in other groups.

Two summands have one order only, so two processes of one device give the bits of one process of two.
"""


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "album"
    story.write_album(folder)
    return folder


@pytest.fixture(scope="module")
def one(album):
    """The run in one process of two devices."""
    workdir = album.parent / "one"
    alone = Processes(album, workdir, 1, devices=2)
    assert alone.ends() == [0], alone.said()
    return result(workdir)


def compare(got, wanted, bound):
    """Equal weights, curves and answers."""
    for path, leaf in wanted[0].items():
        np.testing.assert_allclose(got[0][path], leaf, rtol=0, atol=bound, err_msg=path)
    np.testing.assert_allclose(got[1], wanted[1], rtol=bound, atol=0)
    assert got[2] == wanted[2]


def test_two_processes_train_and_answer_like_one(album, one, tmp_path):
    two = Processes(album, tmp_path / "two", 2)
    assert two.ends() == [0, 0], two.said()
    compare(result(tmp_path / "two"), one, bound=0)
    assert "trains 6,864" in two.said(0)
    assert "trains" not in two.said(1)  # words once, not once a process


@pytest.mark.nightly
def test_an_export_of_what_each_process_holds_whole_and_a_command_for_the_rest(album, tmp_path):
    short = ("--config.export=True", "--config.stages.instruct.steps=2")
    for mesh, said in (("DP", "try:    lvlm chat"), ("FSDP", "lvlm convert export")):
        two = Processes(album, tmp_path / mesh, 2, words=(*short, f"--config.mesh={mesh}"))
        assert two.ends() == [0, 0], two.said()
        assert said in two.said(0)
    line = two.said(0).partition("lvlm convert export ")[2].split("\n")[0].split()
    assert cli.main(["convert", "export", *line]) == 0
    whole, cut = (lvlm_jax.load(tmp_path / mesh).params for mesh in ("DP", "FSDP"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=BOUND), whole, cut)


@pytest.mark.nightly
def test_four_save_two_restore_one_finishes(album, one, tmp_path):
    """SIGTERM comes to one process of four: all stop after the same step; two go on, are stopped, and one ends it."""
    workdir = tmp_path / "run"
    rows, slow = workdir / "instruct" / "metrics.jsonl", ("--config.stages.instruct.save_every=0",)
    for count, step in ((4, 4), (2, 9)):
        running = Processes(album, workdir, count, words=slow).after(rows, step)
        running.running[-1].send_signal(signal.SIGTERM)
        assert running.ends() == [0] * count, running.said()
        assert "saved step" in running.said(0)
        saved = [int(folder.name) for folder in (workdir / "instruct" / "checkpoints").iterdir()]
        assert step <= max(saved) < STEPS
    last = Processes(album, workdir, 1, words=slow)
    assert last.ends() == [0], last.said()
    assert "resuming after step" in last.said()
    compare(result(workdir), one, BOUND)


@pytest.mark.nightly
def test_damage_is_passed_over_by_all(album, one, tmp_path):
    """Process 0 looks for damage; what it finds, all act on."""
    workdir = tmp_path / "run"
    running = Processes(album, workdir, 2).after(workdir / "instruct" / "metrics.jsonl", 8)
    running.running[0].send_signal(signal.SIGTERM)
    assert running.ends() == [0, 0], running.said()
    before, newest = sorted((workdir / "instruct" / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    again = Processes(album, workdir, 2)
    assert again.ends() == [0, 0], again.said()
    assert f"{newest} is damaged" in again.said(0)
    assert f"resuming after step {before.name}" in again.said(0)
    compare(result(workdir), one, bound=0)


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_who_is_left_ends_with_a_message(album, tmp_path, killed):
    two = Processes(album, tmp_path / "run", 2).after(tmp_path / "run" / "instruct" / "metrics.jsonl", 3)
    two.running[killed].kill()
    status = two.ends(200)  # in a save it is the heartbeat that tells, after 100 s
    assert status[killed] == -signal.SIGKILL
    assert status[1 - killed] != 0
    said = two.said(1 - killed)
    # Where process 0 goes, JAX's runtime may end the others before they find out themselves.
    assert "another process of this run has gone" in said or "another task died" in said


def test_a_process_that_hangs_ends_the_others(album, tmp_path):
    two = Processes(album, tmp_path / "run", 2, words=("--config.hang=30",))
    two.after(tmp_path / "run" / "instruct" / "metrics.jsonl", 3)
    two.running[1].send_signal(signal.SIGSTOP)
    status = two.running[0].wait(120)
    two.running[1].send_signal(signal.SIGKILL)
    two.ends()
    assert status == 75, two.said()
    assert "no step was finished within 30 s" in two.said(0)
    assert "loop.py" in two.said(0)  # the stack of where it waited


def test_another_recipe_on_one_host(album, tmp_path):
    two = Processes(album, tmp_path / "run", 2, own={1: ("--config.seed=1",)})
    assert two.ends() == [2, 2], two.said()
    for i in range(2):
        assert two.said(i).count("not the same as on process 0") == 1, two.said(i)
        assert "recipe.seed is 1, not 0" in two.said(i)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_not_shared(album, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    two = Processes(album, tmp_path / "a" / "run", 2, own={1: ("--workdir", "../b/run")})
    assert two.ends() == [2, 2], two.said()
    assert "workdir is" in two.said(1)


def test_what_one_host_alone_lacks(album, tmp_path):
    """Every process reads the records; the one without them says so, the other does not wait for it."""
    lacks = {1: (f"--config.stages.instruct.data.images={tmp_path / 'nowhere'}",)}
    two = Processes(album, tmp_path / "run", 2, own=lacks)
    status = two.ends(200)
    assert 0 not in status, two.said()
    assert "nowhere" in two.said(1)


def test_nobody_answers(album, tmp_path):
    line = ("--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process", "1", "--join-seconds", "3")
    late = Processes(album, tmp_path / "run", 1, words=line)
    assert late.ends(60) == [75]
    assert "did not answer within 3 s" in late.said()


def test_others_never_come(album, tmp_path):
    line = ("--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process", "0", "--join-seconds", "3")
    early = Processes(album, tmp_path / "run", 1, words=line)
    assert early.ends(60) == [75]
    assert "fewer than 2 processes came" in early.said()
    assert os.listdir(tmp_path) == ["run.0.log"]
