"""What `import lvlm_jax`, any of its modules and `lvlm --help` must not do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("jax", "flax", "optax", "numpy", "torch", "tensorflow", "transformers", "orbax", "grain", "PIL")
FRAMEWORKS = ("torch", "tensorflow")
TOUCH = """
import json, os, sys
before = dict(os.environ), list(sys.argv), set(sys.modules)
{action}
print(json.dumps({{
    "loaded": sorted(set(sys.modules) - before[2]),
    "untouched": dict(os.environ) == before[0] and sys.argv == before[1],
}}))
"""
WALK = """
import importlib, json, os, pkgutil, sys
import jax
import lvlm_jax
from jax._src import xla_bridge

settings, environment, started = dict(jax.config.values), dict(os.environ), []
names = [m.name for m in pkgutil.walk_packages(lvlm_jax.__path__, "lvlm_jax.") if ".configs" not in m.name]
for name in names:
    importlib.import_module(name)
    if xla_bridge.backends_are_initialized():
        started.append(name)
        break
print(json.dumps({
    "names": names,
    "started": started,
    "loaded": sorted(sys.modules),
    # A part of jax that is imported first here (Pallas, on jax 0.7) declares settings of its own: that changes none.
    "settings": {k: str(jax.config.values[k]) for k, v in settings.items() if jax.config.values[k] != v},
}))
"""


def run(code: str) -> dict:
    """What a fresh interpreter prints last, as JSON; none of the tests' own settings in its environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "action",
    [
        "import lvlm_jax",
        "import lvlm_jax; lvlm_jax.__version__; dir(lvlm_jax); lvlm_jax.__all__",
        "from lvlm_jax import cli; cli.main([])",
        "from lvlm_jax import cli; cli.main(['--version'])",
        "from lvlm_jax import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass",
        "from lvlm_jax import cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_the_package_and_its_help_are_light(action):
    found = run(TOUCH.format(action=action))
    assert [name for name in HEAVY if name in found["loaded"]] == []
    assert found["untouched"]


def test_no_module_starts_a_backend_or_changes_a_setting():
    found = run(WALK)
    assert {"lvlm_jax.api", "lvlm_jax.run", "lvlm_jax.hub.verify", "lvlm_jax.models.lvlm"} <= set(found["names"])
    assert found["started"] == []
    assert found["settings"] == {}
    assert [name for name in FRAMEWORKS if name in found["loaded"]] == []


def test_an_unknown_name_of_the_package():
    import lvlm_jax

    with pytest.raises(AttributeError, match="module 'lvlm_jax' has no attribute 'laod'"):
        lvlm_jax.laod  # noqa: B018
