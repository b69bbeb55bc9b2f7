"""Whole plans of LLaVA-1.5-7B against kept figures, within 2 %, so that no change makes a step dearer unseen.

On the newest lane, with the compilers that pyproject.toml pins. After a change on purpose, write them anew and read the
difference: ``python -m tests.plan.test_golden --write [NAME ...]``.
"""

import json
import sys
from pathlib import Path

import pytest

from lvlm_jax import recipe
from lvlm_jax.config import ConfigError
from lvlm_jax.plan import report, stage, topology

FILE = Path(__file__).parent.parent / "golden" / "plans.json"
STAGES = {"llava15_align": "align", "llava15_instruct": "instruct"}
ROWS = {"v5e:16x16": 1, "v5p:4x4x4": 2, "v6e:8x8": 1, "h100:8": 2}
"""Topology -> text rows a data shard."""
NAMES = [f"{name} {where}" for name in STAGES for where in ROWS]
SLOW = {"llava15_align v5p:4x4x4", "llava15_instruct v5p:4x4x4"}
"""One a stage for CI; the others are run before a release."""


def plan(name):
    config, where = name.split()
    found = stage.plan_stage(recipe.load(config), STAGES[config], topology.parse(where), ROWS[where])
    return figures(report.as_dict(found))


def figures(said):
    """What is kept of ``lvlm plan --json``: FLOPs, bytes exchanged and memory of a device."""
    memory = said["memory_bytes"]
    return {
        "flops": said["flops_of_a_device"],
        "flops_of_the_model": said["model_flops"],
        "exchanged": sum(said["collective_bytes"].values()),
        "given": sum(memory[kind] for kind in ("trained", "frozen", "optimizer", "batch")),
        "peak": memory["peak"],
    }


def _kept():
    return json.loads(FILE.read_text())


def _no_compiler(where):
    """Why there is none: the TPU's is in the extra [plan], NVIDIA's in [plan-cuda]."""
    try:
        topology.devices(topology.parse(where))
    except ConfigError as error:
        return str(error)
    return ""


def test_every_plan_is_kept():
    assert set(_kept()) == set(NAMES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.nightly) for name in NAMES]
)
def test_a_plan(name):
    if reason := _no_compiler(name.split()[1]):
        pytest.skip(reason)
    assert plan(name) == pytest.approx(_kept()[name], rel=0.02)


if __name__ == "__main__":
    found = _kept() if FILE.is_file() else {}
    for name in sys.argv[2:] or NAMES:
        found[name] = plan(name)
        FILE.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        print(name, found[name], flush=True)
