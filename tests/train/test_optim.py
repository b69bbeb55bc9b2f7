import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvlm_jax import params as trees
from lvlm_jax.train import optim
from lvlm_jax.train.optim import OptimizerConfig, decay_mask, make_optimizer, make_schedule, masked


def _rates(steps=10, counts=(0, 1, 2, 6, 10), **config):
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, **config), steps)
    return [round(float(schedule(n)), 6) for n in counts]


@pytest.mark.parametrize(
    ("config", "golden"),
    [
        ({"schedule": "cosine", "warmup": 2}, [0, 0.5, 1, 0.5, 0]),
        ({"schedule": "cosine", "warmup": 0.2}, [0, 0.5, 1, 0.5, 0]),
        ({"schedule": "cosine", "warmup": 0.11}, [0, 0.5, 1, 0.5, 0]),  # a share rounds up, as in the original trainer
        ({"schedule": "linear", "warmup": 2}, [0, 0.5, 1, 0.5, 0]),
        ({"schedule": "linear"}, [1, 0.9, 0.8, 0.4, 0]),
        ({"schedule": "constant", "warmup": 2}, [0, 0.5, 1, 1, 1]),
        ({"schedule": "cosine", "end_factor": 0.1}, [1, 0.977975, 0.914058, 0.410942, 0.1]),
    ],
)
def test_schedule_golden_values(config, golden):
    assert _rates(**config) == pytest.approx(golden, abs=2e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schedule": "cos"}, r"optimizer.schedule='cos'.*'cosine', 'linear', 'constant'"),
        ({"warmup": 1.5}, r"optimizer.warmup=1.5.*share"),
        ({"b2": 1.0}, r"optimizer.b2=1.0.*\[0, 1\)"),
        ({"clip": 0.0}, r"optimizer.clip=0.0.*None"),
        ({"adaptive_clip": 0.0}, r"optimizer.adaptive_clip=0.0: a positive share"),
        ({"end_factor": 2.0}, r"optimizer.end_factor=2.0"),
        ({"weight_decay": -0.1}, r"optimizer.weight_decay=-0.1"),
    ],
)
def test_bad_values_name_the_field(change, says):
    with pytest.raises(ValueError, match=says):
        OptimizerConfig(**({"learning_rate": 1e-3} | change))


def test_warmup_longer_than_the_stage():
    with pytest.raises(ValueError, match="warmup=20 steps is longer than the stage's 10"):
        make_schedule(OptimizerConfig(learning_rate=1.0, warmup=20), 10)


TREE = {
    "connector": {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.ones(2)},
    "llm": {"table": jnp.ones((3, 2)), "layers": {"attn": {"kernel": jnp.ones((2, 2, 2))}}},
}


def _steps(tx, grads, tree=TREE, count=3):
    state = tx.init(tree)
    for _ in range(count):
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def test_equals_optax_adamw_behind_a_clip():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.3, clip=0.7, b2=0.98)
    grads = jax.tree.map(lambda x: x * 0.7 + 0.1, TREE)
    mask = {"connector": {"kernel": True, "bias": False}, "llm": {"table": True, "layers": {"attn": {"kernel": True}}}}
    assert decay_mask(config, TREE) == mask
    want = optax.chain(optax.clip_by_global_norm(0.7), optax.adamw(0.1, b2=0.98, weight_decay=0.3, mask=mask))
    got = _steps(make_optimizer(config, 10, TREE), grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, _steps(want, grads))


@jax.jit
def _clipped(grads, weights):
    tx = optim._adaptive_clip(0.01)
    return tx.update(grads, tx.init(weights), weights)[0]


def test_adaptive_clip_bounds_each_output_of_each_layer():
    rng = np.random.default_rng(0)
    draw = lambda: {"conv": rng.normal(size=(3, 3, 4, 5)), "kernel": rng.normal(size=(4, 5))}  # noqa: E731
    layers = [{"layers": {str(i): draw() for i in range(3)}, "gain": rng.normal(size=())} for _ in range(2)]
    grads, weights = jax.tree.map(jnp.asarray, layers)
    weights["layers"]["1"]["kernel"] *= 1e-6  # smaller than what a weight's norm is taken to be at least
    apart = _clipped(grads, weights)
    for i, least in (("0", None), ("1", 1e-3)):
        g, w = (np.asarray(x["layers"][i]["kernel"]) for x in (grads, weights))
        bound = 0.01 * (np.linalg.norm(w, axis=0) if least is None else least)
        np.testing.assert_allclose(apart["layers"][i]["kernel"], g * bound / np.linalg.norm(g, axis=0), rtol=1e-5)
    g, w = (np.asarray(x["layers"]["2"]["conv"]).reshape(-1, 5) for x in (grads, weights))
    bound = 0.01 * np.linalg.norm(w, axis=0) / np.linalg.norm(g, axis=0)
    np.testing.assert_allclose(apart["layers"]["2"]["conv"].reshape(-1, 5), g * bound, rtol=1e-5)
    stacked = trees.unstack_layers(_clipped(*map(trees.stack_layers, (grads, weights))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), stacked, apart)
    small = jax.tree.map(lambda x: 1e-6 * x, grads)
    jax.tree.map(np.testing.assert_array_equal, _clipped(small, grads), small)


def test_learning_rates_by_part():
    def moved(**config):
        tx = make_optimizer(OptimizerConfig(learning_rate=0.1, schedule="constant", clip=None, **config), 10, TREE)
        after = _steps(tx, jax.tree.map(jnp.ones_like, TREE), count=1)
        distance = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), TREE, after)
        return trees.flatten(distance)

    got = moved(lr_of=(("llm/layers/*/attn/**", 0.01), ("llm/**", 0.02)))
    want = {"connector/bias": 0.1, "connector/kernel": 0.1, "llm/layers/attn/kernel": 0.01, "llm/table": 0.02}
    assert got == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="'vision/\\*\\*' matches nothing"):
        moved(lr_of=(("vision/**", 1.0),))


def test_masked_holds_no_moments_and_clips_trained_gradients_only():
    mask = trees.mask(TREE, ["connector/**"])
    tx = masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), mask)
    held = [x.shape for x in jax.tree.leaves(tx.init(TREE)) if x.ndim]
    assert sorted(held) == [(2,), (2,), (2, 2), (2, 2)]
    grads = jax.tree.map(jnp.ones_like, TREE)
    huge = grads | {"llm": jax.tree.map(lambda x: x * jnp.nan, grads["llm"])}
    a, b = _steps(tx, grads), _steps(tx, huge)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    jax.tree.map(np.testing.assert_array_equal, a["llm"], TREE["llm"])


def test_documented_example_runs():
    assert doctest.testmod(optim).failed == 0
