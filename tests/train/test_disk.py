"""A run whose disk is full, read-only or gone: a clear error, and the last good step goes on. No failure is played.

Where this machine lets a test mount, the disk is one of the test's own; everywhere else the nearest thing that the
system does: a limit on the size of files, a path below a regular file, a folder that is moved away.
"""

import json
import resource
import subprocess
import threading
import time

import jax
import pytest

from lvlm_jax import params as trees
from lvlm_jax.checkpoint import CheckpointError, Checkpoints, load_params, save_params
from lvlm_jax.train.log import Log
from lvlm_jax.train.loop import IndexedBatches, fit
from tests.disks import can_mount, disk, fill, mount
from tests.e2e import story
from tests.e2e.killed import new_workdir, rows, start, wait_until
from tests.train import tiny
from tests.train.test_damage import equal
from tests.train.test_loop import _command

OWN_DISK = [pytest.param(True, id="own disk")] if can_mount() else []
OWN_DISK_OR_NOT = [*OWN_DISK, pytest.param(False, id="any machine")]


def train(workdir, hook=None, **stage):
    return fit(
        tiny.stage(**stage),
        loss_fn=tiny.loss_fn,
        params=tiny.params(),
        batches=IndexedBatches(tiny.batch),
        workdir=workdir,
        hooks=() if hook is None else (hook,),
    )


def step_7(workdir, action, seen):
    """A hook: `action` when step 7 is done and step 5 saved; after step 10 slow, so that a save ends within a step."""

    def hook(step, state, metrics):
        seen.append(step)
        if step == 7:
            wait_for_step_5(workdir)
            action()
        if step > 10:
            time.sleep(0.5)

    return hook


def wait_for_step_5(workdir):
    deadline, manifest = time.time() + 60, workdir / "align" / "checkpoints" / "5" / "manifest.json"
    while not manifest.exists() or any(thread.name == "checkpoint-5" for thread in threading.enumerate()):
        assert time.time() < deadline
        time.sleep(0.01)


def last_good(workdir):
    """The newest complete step of a run, as its state says that is restored."""
    saved = Checkpoints(workdir / "align" / "checkpoints")
    cards = json.loads((saved.folder / str(saved.latest()) / "manifest.json").read_text())["leaves"]
    like = {path: jax.ShapeDtypeStruct(c["shape"], c["dtype"]) for path, c in cards.items()}
    return int(saved.restore(like=trees.unflatten(like))["step"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed run returns."""
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("own_disk", OWN_DISK)
def test_a_save_that_finds_the_disk_full_stops_the_run_soon(tmp_path, whole, own_disk):
    seen = []
    with disk(tmp_path / "disk", megabytes=12) as workdir:
        with pytest.raises(CheckpointError) as error:
            train(workdir, step_7(workdir, lambda: fill(workdir), seen), log_every=0)
        folder = workdir / "align" / "checkpoints"
        said = f"saving to {folder}/10 failed: No space left on device; the last good step is 5 in {folder}"
        assert str(error.value) == said
        assert max(seen) < 15, "not before the next save"
        assert last_good(workdir) == 5
        (workdir / "ballast").unlink()
        equal(train(workdir), whole)


@pytest.mark.parametrize("own_disk", OWN_DISK)
def test_a_row_that_finds_the_disk_full_names_the_file(tmp_path, own_disk):
    with disk(tmp_path / "disk") as folder:
        log = Log(folder, stage=tiny.stage(log_every=1))
        fill(folder)
        full = pytest.raises(OSError, match=r"No space left on device: '.*/disk/metrics\.jsonl'")
        with full:
            for step in range(10_000):
                log.row(step, {"loss": 1.0})
        log.close()


def test_files_that_may_not_grow_stop_a_run_with_the_reason(tmp_path, whole):
    """The same on any machine: from some moment on the system refuses every write."""
    process = _command(tmp_path, seconds=0.1)
    wait_until(lambda: rows(tmp_path / "align" / "metrics.jsonl") >= 7, process)
    wait_for_step_5(tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "File too large" in said.splitlines()[-1]
    assert last_good(tmp_path) >= 5
    equal(train(tmp_path), whole)


@pytest.mark.parametrize("own_disk", OWN_DISK_OR_NOT)
def test_a_workdir_that_vanishes_is_an_error_and_is_not_made_anew(tmp_path, whole, own_disk):
    workdir, away, seen = tmp_path / "disk" / "run", tmp_path / "away", []
    if own_disk:
        with disk(tmp_path / "real") as real, disk(tmp_path / "disk"):
            mount("--bind", real, tmp_path / "disk")
            with pytest.raises(CheckpointError, match=r"checkpoints/10 failed: the folder is gone; was it removed, or"):
                train(workdir, step_7(workdir, lambda: unmount(tmp_path / "disk"), seen), log_every=0)
            assert list((tmp_path / "disk").iterdir()) == [], "nothing is written beside a disk that is not there"
            assert last_good(real / "run") == 5
            equal(train(real / "run"), whole)
    else:
        with pytest.raises(CheckpointError, match=r"checkpoints/10 failed: the folder is gone; was it removed, or"):
            train(workdir, step_7(workdir, lambda: workdir.rename(away), seen), log_every=0)
        assert not workdir.exists()
        assert last_good(away) == 5
        equal(train(away), whole)
    assert max(seen) <= 10


def unmount(folder):
    subprocess.run(["umount", "-l", folder], check=True)


def test_the_next_row_finds_that_the_workdir_is_gone(tmp_path):
    workdir, seen = tmp_path / "run", []
    with pytest.raises(
        FileNotFoundError, match=r"metrics\.jsonl is gone; was the workdir removed, or its disk unmounted"
    ):
        train(workdir, step_7(workdir, lambda: workdir.rename(tmp_path / "away"), seen))
    assert seen[-1] == 7
    assert not workdir.exists()
    assert last_good(tmp_path / "away") == 5


def test_a_workdir_below_a_regular_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"Not a directory: '.*/file/run"):
        train(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match=r"saving to .*/file/params failed: Not a directory: "):
        save_params(tmp_path / "file" / "params", tiny.params())


@pytest.mark.parametrize("own_disk", OWN_DISK)
def test_a_read_only_workdir(tmp_path, whole, own_disk):
    class Stopped(Exception):
        pass

    def stop(step, state, metrics):
        if step == 7:
            raise Stopped

    with disk(tmp_path / "disk") as workdir:
        with pytest.raises(Stopped):
            train(workdir, stop)
        mount("-o", "remount,ro", workdir)
        with pytest.raises(OSError, match=r"Read-only file system: '.*/align/metrics\.jsonl"):
            train(workdir)
        with pytest.raises(OSError, match=r"Read-only file system: '.*/new"):
            train(workdir / "new")
        with pytest.raises(CheckpointError, match=r"saving to .*/params failed: Read-only file system: "):
            save_params(workdir / "params", tiny.params())
        assert last_good(workdir) == 5
        mount("-o", "remount,rw", workdir)
        equal(train(workdir), whole)
        mount("-o", "remount,ro", workdir)  # a finished run is read from a disk that cannot be written
        equal(load_params(workdir / "align" / "params", like=whole), whole)


@pytest.mark.slow
@pytest.mark.parametrize("own_disk", OWN_DISK_OR_NOT)
def test_the_command_says_it_in_one_line(tmp_path, own_disk):
    story.write_album(tmp_path / "album")
    if own_disk:
        with disk(tmp_path / "disk", megabytes=64) as folder:
            said = full_after_step_7(tmp_path / "album", new_workdir(folder / "run"), lambda process: fill(folder))
        assert "No space left on device" in said[-1], said
        assert "metrics.jsonl" in said[-1] or "the last good step is" in said[-1]
    else:
        limit = lambda process: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))  # noqa: E731
        said = full_after_step_7(tmp_path / "album", new_workdir(tmp_path / "run"), limit)
        assert "File too large" in said[-1], said
    assert said[-1].startswith("lvlm train: "), said
    assert not [line for line in said if "Traceback" in line or "raised an exception" in line], said


def full_after_step_7(album, workdir, action):
    """What the command says whose disk becomes full after the first save of its first stage."""
    process = start(album, workdir)
    saved = workdir / "vision" / "checkpoints" / "7" / "manifest.json"
    wait_until(saved.exists, process)
    action(process)
    said = process.communicate(timeout=300)[0].decode().splitlines()
    assert process.returncode == 1, said
    return said
