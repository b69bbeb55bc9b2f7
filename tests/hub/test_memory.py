"""Importing holds less than one shard file beside the arrays; exporting, the shard that waits."""

import json
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from lvlm_jax.hub.families import KINDS
from lvlm_jax.hub.safetensors_io import INDEX, write_folder
from lvlm_jax.llm import llama
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.params import flatten

MIB = 2**20
SHARD = 40 * MIB
CONFIG = DecoderConfig(vocab=2048, width=512, depth=36, heads=8, kv_heads=8, mlp_dim=1408)
SMALL = DecoderConfig(vocab=64, width=32, depth=2, heads=2, kv_heads=2, mlp_dim=48)

# Runs in a process of its own. "start" is the peak after the same work on a tiny folder, so that what a compiler and a
# tracer need once is not counted; the peak is reset by the kernel's own switch.
CHILD = """
import gc, json, sys
import jax, jax.numpy as jnp
from lvlm_jax.hub.convert import import_folder, export_folder

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

small, big, how, out = sys.argv[1:]
options = {"plain": {}, "scan": {"scan": True}, "cast": {"dtype": jnp.float32}}[how]
warm = import_folder(small, **options)
export_folder(out + "-small", warm.config, warm.params)
del warm
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
start = status("VmRSS")
loaded = import_folder(big, **options)
imported = status("VmHWM")
arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
held = status("VmRSS")
export_folder(out, loaded.config, loaded.params, max_shard_bytes=40 * 2**20)
print(json.dumps({"import": imported - start - arrays, "export": status("VmHWM") - held, "arrays": arrays}))
"""


def folder(path, config):
    rng = np.random.default_rng(0)
    shapes = flatten(KINDS["decoder"].shapes(config, False)[0])
    tensors = (
        (row.theirs, row.save({p: rng.standard_normal(shapes[p].shape, np.float32).astype(ml_dtypes.bfloat16)}))
        for row in KINDS["decoder"].rows(config, "hf")
        for p in row.leaves
    )
    write_folder(path, tensors, SHARD)
    (path / "config.json").write_text(json.dumps(llama.to_hf(config)))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    big = folder(root / "big", CONFIG)
    sizes = [file.stat().st_size for file in big.glob("*.safetensors")]
    assert len(sizes) == 6
    assert max(sizes) < SHARD + MIB
    assert (big / INDEX).exists()
    return folder(root / "small", SMALL), big


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's count of resident memory")
@pytest.mark.parametrize("how", ["plain", "scan", "cast"])
def test_peak_above_the_arrays_stays_under_one_shard(folders, tmp_path, how):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, folders), how, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: f"{value / MIB:.1f} MiB" for name, value in found.items()}, how)
    assert found["arrays"] > 200 * MIB
    assert found["import"] < SHARD, found
    assert found["export"] < 2 * SHARD, found  # the shard that waits, and one tensor on its way
