"""launch/gke: the manifest against the fields that its API has, the image, and what runs in a container."""

import math
import re
import shlex
import signal
import subprocess
import tomllib

import pytest
import yaml

from lvlm_jax import recipe
from tests.launch.stubs import LAUNCH, ROOT, program

WORDS = ("--config", "llava15_align", "--workdir", "/bucket/align", "--config.name=a 'b' $c\\")

FIELDS = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": dict},
    # JobSetSpec, ReplicatedJob, FailurePolicy, FailurePolicyRule: kubernetes-sigs/jobset v0.12,
    # api/jobset/v1alpha2/jobset_types.go
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    # JobSpec, PodFailurePolicy: kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "backoffLimit": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": str,
                                    "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
                                }
                            ]
                        },
                        # PodSpec, Container: .../workload-resources/pod-v1
                        # Volume: .../config-and-storage-resources/volume
                        "template": {
                            "metadata": {"annotations": dict},
                            "spec": {
                                "restartPolicy": str,
                                "terminationGracePeriodSeconds": int,
                                "serviceAccountName": str,
                                "nodeSelector": dict,
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "args": [str],
                                        "resources": {"limits": dict},
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                    }
                                ],
                                "volumes": [
                                    {
                                        "name": str,
                                        "csi": {"driver": str, "volumeAttributes": dict},
                                        "emptyDir": {"medium": str},
                                    }
                                ],
                            },
                        },
                    },
                },
            }
        ],
    },
}
"""Every field that the manifest uses, where it stands in the API, and its type."""

MACHINES = {
    "tpu-v4-podslice": 4,
    "tpu-v5-lite-podslice": 4,
    "tpu-v5p-slice": 4,
    "tpu-v6e-slice": 4,
    "tpu7x": 4,
}
"""Values of cloud.google.com/gke-tpu-accelerator -> chips of a machine in a slice of several machines.

cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus; the same in xpk 1.16.0, core/system_characteristics.py.
"""


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def job(manifest):
    """The spec of the one job that is replicated."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.fixture(scope="module")
def pod(job):
    return job["template"]["spec"]


def unknown(value, fields, path=""):
    """Paths of `value` that `fields` does not have, or has with another type."""
    if isinstance(fields, dict) and isinstance(value, dict):
        for name, inner in value.items():
            at = f"{path}.{name}"
            yield from unknown(inner, fields[name], at) if name in fields else [at]
    elif isinstance(fields, list) and isinstance(value, list):
        for inner in value:
            yield from unknown(inner, fields[0], f"{path}[]")
    elif not isinstance(fields, type) or type(value) is not fields:
        yield f"{path}: {type(value).__name__}"


def test_every_field_is_one_of_the_api(manifest):
    assert list(unknown(manifest, FIELDS)) == []
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"spec": {"failurePolicy": {"maxRestart": 3}}}, [".spec.failurePolicy.maxRestart"]),
        ({"spec": {"failurePolicy": {"maxRestarts": "3"}}}, [".spec.failurePolicy.maxRestarts: str"]),
        ({"spec": {"replicatedJobs": {}}}, [".spec.replicatedJobs: dict"]),
    ],
)
def test_a_wrong_field_is_found(change, found):
    assert list(unknown(change, FIELDS)) == found


def test_as_many_machines_as_the_topology_has(job, pod):
    selector = pod["nodeSelector"]
    assert set(selector) == {"cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"}
    chips = MACHINES[selector["cloud.google.com/gke-tpu-accelerator"]]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    topology = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"] == topology // chips


def test_all_start_again_unless_the_request_was_wrong(manifest, job, pod):
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])  # as jobset_types.go has it
    (pods,) = job["podFailurePolicy"]["rules"]
    assert pods["action"] == "FailJob"
    assert pods["onExitCodes"] == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [2]}
    # A job with a podFailurePolicy must not restart in place; one machine that fails, fails the job.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)


def test_one_slice_is_one_node_pool(manifest):
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"  # ExclusiveKey in jobset_types.go
    assert manifest["metadata"]["annotations"] == {key: "cloud.google.com/gke-nodepool"}


def test_the_workdir_is_in_a_bucket_that_all_see(job, pod):
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
    assert volumes == {}
    words = container["args"]
    assert words[words.index("--workdir") + 1].startswith("/bucket/")
    # cloud.google.com/kubernetes-engine/docs/how-to/cloud-storage-fuse-csi-driver-ephemeral
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    bucket = mounts["/bucket"]["csi"]
    assert bucket["driver"] == "gcsfuse.csi.storage.gke.io"
    assert set(bucket["volumeAttributes"]["mountOptions"].split(",")) == {
        "metadata-cache:ttl-secs:0",
        "metadata-cache:negative-ttl-secs:0",
    }
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}


def test_its_words_are_those_of_a_run(pod):
    words = pod["containers"][0]["args"]
    assert words[0::2] == ["--config", "--workdir"]
    assert recipe.load(words[1], []).run


def test_the_image_holds_what_an_installation_needs():
    lines = (LAUNCH / "gke" / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    copied = {name for names in copied for name in names}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    named = {project["project"]["readme"], *project["project"]["license-files"]}
    assert {"pyproject.toml", *named, *wheel["packages"], *wheel["force-include"]} <= copied
    (entry,) = (line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT "))
    assert entry == '["/lvlm/launch/gke/train.sh"]'
    assert "WORKDIR /lvlm" in lines
    assert "launch/gke/train.sh" in copied


# ---------------------------------------------------------------------------------------------------------------------
# In a container


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_a_container_ends_as_the_run_ends(status, stubs, tmp_path):
    tells = program(
        tmp_path / "lvlm", f'#!/usr/bin/env bash\nprintf "%s|" "$@"; env | grep -E "^(JAX|LVLM_D)"; exit {status}'
    )
    done = stubs.run("gke/train.sh", *WORDS, LVLM=tells)
    assert done.returncode == status
    first, *rest = done.stdout.removeprefix("|".join(["train", *WORDS, ""])).splitlines()
    assert sorted([first, *rest]) == ["JAX_PLATFORMS=tpu", "LVLM_DISTRIBUTED=1"]


@pytest.mark.parametrize("status", [0, 1])
def test_a_container_told_to_end_saves_and_is_started_again(status, stubs, tmp_path):
    waits = f"trap 'sleep 0.5; echo saved; exit {status}' TERM; echo ready; while true; do sleep 0.1; done"
    lvlm = program(tmp_path / "lvlm", f"#!/usr/bin/env bash\n{waits}")
    environment = stubs.environment(LVLM=lvlm)
    command = [str(LAUNCH / "gke" / "train.sh"), "x"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "saved\n"
        assert process.wait(timeout=20) == 75


# ---------------------------------------------------------------------------------------------------------------------
# xpk

RUN = {
    "CLUSTER": "tpus",
    "WORKLOAD": "align",
    "TPU_TYPE": "tpu7x-4x4x4",
    "STORAGE": "bucket",
    "IMAGE": "REGISTRY/lvlm:1",
}


def test_xpk_gets_one_line(stubs):
    """Flags as `xpk workload create --help` of xpk 1.16.0 has them."""
    assert stubs.run("gke/xpk.sh", *WORDS, **RUN).returncode == 0
    (call,) = stubs.calls
    assert call[:-1] == [
        "xpk",
        "workload",
        "create",
        "--cluster=tpus",
        "--workload=align",
        "--tpu-type=tpu7x-4x4x4",
        "--storage=bucket",
        "--docker-image=REGISTRY/lvlm:1",
        "--max-restarts=50",
        "--restart-on-exit-codes=75",
        "--termination-grace-period-seconds=300",
    ]
    command = call[-1].removeprefix("--command=")
    assert shlex.split(command) == ["/lvlm/launch/gke/train.sh", *WORDS]


@pytest.mark.parametrize("missing", RUN)
def test_what_xpk_misses_is_named(missing, stubs):
    done = stubs.run("gke/xpk.sh", *WORDS, **{name: value for name, value in RUN.items() if name != missing})
    assert done.returncode != 0
    assert f"{missing}: " in done.stderr
    assert stubs.calls == []
