"""A model, data and stages of a few dozen weights for the training tests; as a script, one run to be killed.

`python tiny.py WORKDIR [SECONDS_PER_BATCH]` trains `stage()` and prints "done".
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.train.loop import IndexedBatches
from lvlm_jax.train.optim import OptimizerConfig
from lvlm_jax.train.stages import SpikePolicy, Stage


def params(depth: int = 0) -> dict:
    """{"tower", "connector", "llm"}; with `depth`, llm has a scanned stack of that many layers."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    tree = {
        "tower": {"kernel": jax.random.normal(next(keys), (8, 8)), "bias": jax.random.normal(next(keys), (8,))},
        "connector": {"kernel": jax.random.normal(next(keys), (8, 8)) / 3, "bias": jnp.zeros((8,))},
        "llm": {"head": {"kernel": jax.random.normal(next(keys), (8, 4)) / 3}},
    }
    if depth:
        tree["llm"]["layers"] = {"mlp": {"kernel": jax.random.normal(next(keys), (depth, 8, 8)) / 3}}
    return tree


def loss_fn(params: dict, batch: dict) -> tuple:
    """Weighted squared error of a small tanh network."""
    h = jnp.tanh(batch["x"] @ params["tower"]["kernel"] + params["tower"]["bias"])
    h = jnp.tanh(h @ params["connector"]["kernel"] + params["connector"]["bias"])
    if "layers" in params["llm"]:
        kernels = params["llm"]["layers"]
        rows = kernels["mlp"]["kernel"] if "mlp" in kernels else [kernels[str(i)]["mlp"]["kernel"] for i in range(3)]
        for kernel in rows:
            h = h + jnp.tanh(h @ kernel)
    out = h @ params["llm"]["head"]["kernel"]
    error = jnp.square(out - batch["y"]).sum(-1)
    return (error * batch["w"]).sum(), batch["w"].sum(), {"rows": jnp.float32(len(error))}


def batch(k: int, rows: int = 8) -> dict:
    """Batch k: a pure function of k."""
    random = np.random.default_rng(k)
    x = random.normal(size=(rows, 8)).astype(np.float32)
    y = np.stack([x[:, 0], x[:, 1] * x[:, 2], np.sin(x[:, 3]), x[:, 4]], 1).astype(np.float32)
    return {"x": x, "y": y, "w": random.integers(1, 4, rows).astype(np.float32)}


def stage(**changes) -> Stage:
    """Connector and language model trained, tower frozen."""
    values = {
        "name": "align",
        "trains": ("connector/**", "llm/**"),
        "steps": 24,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup=3, weight_decay=0.1),
        "log_every": 1,
        "save_every": 5,
        "spike": SpikePolicy(factor=100.0),
    }
    return Stage(**(values | changes))


def slow_batches(seconds: float) -> IndexedBatches:
    """Batches that take a while, so that a signal arrives in the middle of the run."""

    def make(k: int) -> dict:
        time.sleep(seconds)
        return batch(k)

    return IndexedBatches(make)


if __name__ == "__main__":
    from lvlm_jax.train.loop import fit

    batches = slow_batches(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    fit(stage(), loss_fn=loss_fn, params=params(), batches=batches, workdir=sys.argv[1])
    print("done")
