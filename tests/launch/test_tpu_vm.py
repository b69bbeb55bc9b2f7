"""launch/tpu_vm.sh: the life of a run on TPU VMs, call by call, and every way in which it can go wrong.

Flags as `gcloud compute tpus queued-resources` and `gcloud compute tpus tpu-vm` of Google Cloud SDK 528.0.0 have them
(their --help); states of a queued resource as the TPU API v2 has them (QueuedResourceState.State).
"""

import json
import sys
import tarfile
import time

import pytest

from tests.launch.stubs import Stubs, program

SLICE = {"TPU_NAME": "align", "ZONE": "us-east5-a", "ACCELERATOR": "v5p-128", "POLL": 0}
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
LIST = [*QUEUED, "list", "--zone=us-east5-a", "--filter=name~/align$", "--format=value(state.state)"]
CREATE = [
    *QUEUED,
    "create",
    "align",
    "--node-id=align",
    "--zone=us-east5-a",
    "--accelerator-type=v5p-128",
    "--runtime-version=v2-alpha-tpuv5",
]
WORDS = ("--config", "llava15_align", "--workdir", "my-bucket/align", "--config.name=a 'b' $c\\")
LVLM = f"""#!{sys.executable}
import json, os, signal, sys, time
names = ("LVLM_DISTRIBUTED", "JAX_PLATFORMS")
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
print(json.dumps([sys.argv[1:], os.getcwd(), [os.environ.get(name) for name in names]]), flush=True)
time.sleep(60)
"""
"""What `uv pip install` leaves on a worker: it says how it was called, and saves when it is asked to end."""


def states(stubs, *answers):
    """What gcloud says of the queued resource, look by look."""
    stubs.answer(" ".join(LIST), *answers)


def ssh(worker, command):
    at = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "align", "--zone=us-east5-a"]
    return [*at, f"--worker={worker}", f"--command={command}"]


def test_create_asks_once_and_waits(stubs):
    states(stubs, "", "", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = stubs.run("tpu_vm.sh", "create", "--spot", "--valid-until-duration=6h", **SLICE)
    assert (done.returncode, done.stderr) == (0, "")
    assert stubs.calls == [LIST, [*CREATE, "--spot", "--valid-until-duration=6h"], *[LIST] * 5]
    assert done.stdout.splitlines() == [
        "align: not listed yet",
        "align: WAITING_FOR_RESOURCES",
        "align: PROVISIONING",
        "align: ACTIVE; it costs until launch/tpu_vm.sh delete",
    ]


@pytest.mark.parametrize("first", ["ACTIVE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACCEPTED", "CREATING"])
def test_create_again_asks_for_no_second_slice(first, stubs):
    states(stubs, first, "ACTIVE")
    assert stubs.run("tpu_vm.sh", "create", **SLICE).returncode == 0
    assert set(map(tuple, stubs.calls)) == {tuple(LIST)}


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING", "SUSPENDED"])
@pytest.mark.parametrize("before", [(), ("", "WAITING_FOR_RESOURCES")])
def test_a_request_that_came_to_nothing_ends_the_wait(state, before, stubs):
    states(stubs, *before, state)
    done = stubs.run("tpu_vm.sh", "create", **SLICE)
    assert done.returncode == 1
    assert f"align is {state}" in done.stderr
    assert "It stays until you say delete; then create" in done.stderr
    assert [call for call in stubs.calls if "delete" in call] == []


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_the_image_of_the_machines_goes_by_their_kind(accelerator, runtime, stubs):
    states(stubs, "", "ACTIVE")
    assert stubs.run("tpu_vm.sh", "create", **SLICE | {"ACCELERATOR": accelerator}).returncode == 0
    assert stubs.calls[1] == [*CREATE[:-2], f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"]


def test_another_image_can_be_given(stubs):
    states(stubs, "", "ACTIVE")
    assert stubs.run("tpu_vm.sh", "create", RUNTIME="mine", **SLICE).returncode == 0
    assert stubs.calls[1] == [*CREATE[:-1], "--runtime-version=mine"]


@pytest.mark.parametrize(
    ("words", "without", "more", "message"),
    [
        (["create"], "ACCELERATOR", {}, "ACCELERATOR: kind and size of the slice"),
        (["create"], "TPU_NAME", {}, "TPU_NAME: a name for the slice"),
        (["delete"], "ZONE", {}, "ZONE: where it is"),
        (["create"], "", {"ACCELERATOR": "tpu7x-128"}, "TPU7x is to be had by GKE only, see launch/gke"),
        (["create"], "", {"ACCELERATOR": "h100"}, "ACCELERATOR=h100: v4-*, v5litepod-*, v5p-* or v6e-*"),
        (["train"], "", {}, "train WORDS...: what lvlm train takes"),
        (["mount"], "", {}, "the bucket, without gs://"),
        (["mount", "gs://my-bucket"], "", {}, "mount gs://my-bucket: the name of a bucket, without gs:// and folders"),
        (["start"], "", {}, "no command start; they are create, install, mount, train, logs, stop, status, delete"),
    ],
)
def test_a_mistake_is_named_before_anything_is_asked(words, without, more, message, stubs):
    given = {name: value for name, value in (SLICE | more).items() if name != without}
    done = stubs.run("tpu_vm.sh", *words, **given)
    assert done.returncode != 0
    assert message in done.stderr
    assert stubs.calls == []


@pytest.mark.parametrize("words", [["install"], ["mount", "my-bucket"], ["train", *WORDS], ["logs"], ["stop"]])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("", "there is no queued resource align in us-east5-a: create it first"),
        ("PROVISIONING", "align is PROVISIONING, not ACTIVE yet"),
        ("SUSPENDED", "align is SUSPENDED (a spot slice that was taken back"),
        ("FAILED", "align is FAILED"),
    ],
)
def test_without_a_slice_nothing_runs(words, state, message, stubs):
    states(stubs, state)
    done = stubs.run("tpu_vm.sh", *words, **SLICE)
    assert done.returncode == 1
    assert message in done.stderr
    assert stubs.calls == [LIST]


def test_an_error_of_gcloud_is_not_taken_for_an_absent_slice(stubs):
    stubs.answer(" ".join(LIST), "not logged in", status=1)
    done = stubs.run("tpu_vm.sh", "create", **SLICE)
    assert (done.returncode, stubs.calls) == (1, [LIST])


def test_status_and_delete_are_one_call_each(stubs):
    assert stubs.run("tpu_vm.sh", "status", **SLICE).returncode == 0
    assert stubs.calls == [[*QUEUED, "describe", "align", "--zone=us-east5-a"]]
    stubs.forget()
    done = stubs.run("tpu_vm.sh", "delete", **SLICE)
    # No --quiet: gcloud asks first, and refuses where nobody is there to answer.
    assert stubs.calls == [[*QUEUED, "delete", "align", "--zone=us-east5-a", "--force"]]
    assert "align is deleted; disks that were attached and buckets stay, and cost" in done.stdout


def test_a_refused_deletion_is_not_called_one(stubs):
    stubs.answer(" ".join([*QUEUED, "delete"]), "Aborted by user.", status=1)
    done = stubs.run("tpu_vm.sh", "delete", **SLICE)
    assert done.returncode == 1
    assert "is deleted" not in done.stdout


@pytest.fixture
def slice_of_two(tmp_path):
    """A slice that is there, of two workers on which commands really run."""
    stubs = Stubs(tmp_path / "stubs", workers=2)
    stubs.add("python3")
    states(stubs, "ACTIVE")
    return stubs


def installed(stubs):
    """Both workers, with the program that an installation leaves."""
    for home in stubs.homes:
        (home / ".lvlm" / "env" / "bin").mkdir(parents=True)
        program(home / ".lvlm" / "env" / "bin" / "lvlm", LVLM)
    return stubs


def wait_for(found):
    """Until it is true, for ten seconds."""
    for _ in range(100):
        if found():
            return
        time.sleep(0.1)
    raise AssertionError("in vain")


def test_install_brings_this_commit_and_the_same_versions_to_every_worker(slice_of_two):
    for _ in range(2):  # a second time over the first
        assert slice_of_two.run("tpu_vm.sh", "install", **SLICE).returncode == 0
        state, scp, remote, *on_workers = slice_of_two.calls
        slice_of_two.forget()
        assert state == LIST
        assert [*scp[:5], *scp[6:]] == [
            "gcloud", "compute", "tpus", "tpu-vm", "scp", "align:.lvlm.tar.gz", "--zone=us-east5-a", "--worker=all",
        ]  # fmt: skip
        assert remote[:-1] == ssh("all", "")[:-1]
        pip, install, venv = sorted(on_workers)[::2]
        assert pip == ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"]
        assert venv == ["uv", "venv", "--quiet", "--allow-existing", "--python", "3.12", ".lvlm/env"]
        assert install[:7] == ["uv", "pip", "install", "--quiet", "--python", "../env/bin/python", "--exclude-newer"]
        assert install[8:] == [".[tpu]"]
        assert sorted(on_workers) == sorted([pip, venv, install] * 2)  # the same date, so the same versions
    for home in slice_of_two.homes:
        with tarfile.open(home / ".lvlm.tar.gz") as archive:
            names = set(archive.getnames())
        assert {"pyproject.toml", "lvlm_jax/cli.py", "configs/llava15_align.py"} <= names
        assert (home / ".lvlm" / "source" / "pyproject.toml").read_text()


def test_mount_keeps_no_cache_that_hides_what_others_wrote(slice_of_two):
    slice_of_two.add("mountpoint")
    slice_of_two.answer("mountpoint", "", status=1)
    assert slice_of_two.run("tpu_vm.sh", "mount", "my-bucket", **SLICE).returncode == 0
    flags = ["--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"]
    mounted = [["gcsfuse", *flags, "my-bucket", str(home / "my-bucket")] for home in slice_of_two.homes]
    assert sorted(call for call in slice_of_two.calls if call[0] == "gcsfuse") == mounted
    assert all((home / "my-bucket").is_dir() for home in slice_of_two.homes)


def test_mounted_is_not_mounted_again_and_without_gcsfuse_it_says_so(slice_of_two):
    slice_of_two.add("mountpoint")
    assert slice_of_two.run("tpu_vm.sh", "mount", "my-bucket", **SLICE).returncode == 0
    assert "gcsfuse" not in [call[0] for call in slice_of_two.calls]
    (slice_of_two.bin / "gcsfuse").unlink()
    done = slice_of_two.run("tpu_vm.sh", "mount", "my-bucket", **SLICE)
    assert done.returncode == 1
    assert "gcsfuse is not installed on this machine" in done.stderr


def test_train_logs_stop_on_all_workers(slice_of_two):
    stubs = installed(slice_of_two)
    assert stubs.run("tpu_vm.sh", "train", *WORDS, **SLICE).returncode == 0
    logs = [home / ".lvlm" / "log" for home in stubs.homes]
    wait_for(lambda: all(log.read_text() for log in logs))
    for home, log in zip(stubs.homes, logs, strict=True):
        assert json.loads(log.read_text()) == [["train", *WORDS], str(home), ["1", "tpu"]]

    again = stubs.run("tpu_vm.sh", "train", *WORDS, **SLICE)
    assert again.returncode == 1
    assert again.stderr.count("a run is under way here") == 2

    assert stubs.run("tpu_vm.sh", "stop", **SLICE).returncode == 0
    assert [log.read_text().splitlines()[1:] for log in logs] == [["saved"], ["saved"]]
    followed = stubs.run("tpu_vm.sh", "logs", "1", **SLICE)
    assert followed.stdout == logs[1].read_text()

    assert stubs.run("tpu_vm.sh", "train", *WORDS, **SLICE).returncode == 0  # the same words resume, in the same log
    wait_for(lambda: all(len(log.read_text().splitlines()) == 3 for log in logs))
    assert stubs.run("tpu_vm.sh", "stop", **SLICE).returncode == 0


def test_the_whole_life_preempted_once(stubs):
    """Every call from the first to the last, in order; deleted only when told to."""
    states(stubs, "", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE", "ACTIVE", "ACTIVE")
    did = []
    for words in (
        ["create", "--spot"],
        ["mount", "my-bucket"],
        ["train", *WORDS],
        ["logs"],  # taken back while nobody looked
        ["create", "--spot"],  # the old one is still there
        ["delete"],
        ["create", "--spot"],
        ["mount", "my-bucket"],
        ["train", *WORDS],
        ["delete"],
    ):
        stubs.forget()
        done = stubs.run("tpu_vm.sh", *words, **SLICE)
        did.append((words[0], done.returncode, [call[4] for call in stubs.calls]))
    assert did == [
        ("create", 0, ["list", "create", "list"]),
        ("mount", 0, ["list", "ssh"]),
        ("train", 0, ["list", "ssh"]),
        ("logs", 1, ["list"]),
        ("create", 1, ["list"]),
        ("delete", 0, ["delete"]),
        ("create", 0, ["list", "create", "list"]),
        ("mount", 0, ["list", "ssh"]),
        ("train", 0, ["list", "ssh"]),
        ("delete", 0, ["delete"]),
    ]
