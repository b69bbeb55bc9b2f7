"""Dual encoders: sharded equals unsharded, scanned equals per layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.models.contrastive import DualEncoder, DualEncoderConfig
from lvlm_jax.nn.linear import abstract
from lvlm_jax.train import losses
from lvlm_jax.vision.text_tower import TextTowerConfig
from tests import tiny

TEXT = TextTowerConfig(vocab=99, width=32, depth=2, heads=4, mlp_dim=48, context=16)
CONFIGS = {
    "clip": DualEncoderConfig(vision=tiny.CLIP, text=TEXT, projection=24),
    "siglip": DualEncoderConfig(
        vision=dataclasses.replace(tiny.SIGLIP, pool="map"),
        text=dataclasses.replace(TEXT, causal=False, pool="last", head=32, activation="gelu_tanh"),
        bias=True,
    ),
}
CONFIGS["siglip2"] = dataclasses.replace(CONFIGS["siglip"], vision=tiny.SIGLIP2)
GRIDS = [(4, 5), (2, 7), (5, 3), (1, 2), (4, 4), (20, 1), (3, 3), (1, 1)]


def pairs(name):
    """Eight pictures, eight texts, a group each; for SigLIP 2 each picture has a shape of its own."""
    batch, _ = tiny.batch(tiny.SYSTEMS["llava15"], [[tiny.IMAGE]] * 8, groups=8)
    if name == "siglip2":
        patches = np.random.default_rng(1).normal(size=(8, 1, 20, 147)).astype(np.float32)
        positions, shown = np.zeros((8, 1, 20, 2), np.int32), np.zeros((8, 1, 20), np.int32)
        for n, (rows, cols) in enumerate(GRIDS):
            places = np.stack(np.meshgrid(range(rows), range(cols), indexing="ij"), -1).reshape(-1, 2)
            positions[n, 0, : rows * cols], shown[n, 0, : rows * cols] = places, 1
        batch = batch.replace(patches=patches, patch_positions=positions, patch_segments=shown)
    tokens = np.random.default_rng(0).integers(0, 99, batch.tokens.shape).astype(np.int32)
    return jax.tree.map(jnp.asarray, batch.replace(tokens=tokens))


def loss(params, model, batch):
    """Symmetric cross-entropy over the whole batch."""
    image, text, scale, bias = model.apply({"params": params}, batch)
    scores = scale * image @ text.T + bias
    both = jax.nn.log_softmax(scores, axis=0) + jax.nn.log_softmax(scores, axis=1)
    return -jnp.diagonal(both).mean()


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param("siglip2", "FSDP_TP", marks=pytest.mark.slow),
        *(
            pytest.param(name, preset, marks=pytest.mark.nightly)
            for name in ("clip", "siglip")
            for preset in ("DP", "FSDP", "FSDP_TP")
        ),
    ],
)
def test_sharded_and_scanned_equal_neither(name, preset):
    batch, model, mesh = pairs(name), DualEncoder(CONFIGS[name]), M.make_mesh(preset)
    params = tiny.randomize(abstract(model, batch)[0])
    value, grads = tiny.jit(jax.value_and_grad(loss), static_argnums=1)(params, model, batch)
    scanned = DualEncoder(CONFIGS[name], scan=True)
    shapes, axes = abstract(scanned, batch)
    cut = M.shardings(mesh, axes, shapes)
    step = tiny.jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, cut))
    with M.use(mesh):
        got = step(jax.device_put(P.stack_layers(params), cut), scanned, jax.device_put(batch, M.batch_sharding(mesh)))
    np.testing.assert_allclose(got[0], value, rtol=2e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * largest)  # noqa: E731
    jax.tree.map(close, P.unstack_layers(got[1]), grads)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "map"])
def test_a_row_that_only_fills_a_batch_leaves_the_gradient_whole(pool):
    """An epoch's last batch has rows without a picture; a tower that pools patches makes a zero vector of them."""
    batch = pairs("siglip")
    vision = dataclasses.replace(CONFIGS["siglip"].vision, pool=pool)
    config = dataclasses.replace(CONFIGS["clip"], vision=vision)
    model = DualEncoder(config)
    params = tiny.randomize(abstract(model, batch)[0])
    empty = batch.replace(patch_segments=batch.patch_segments.at[-1].set(0), segments=batch.segments.at[-1].set(0))

    def masked(params, batch):
        image, text, scale, _ = model.apply({"params": params}, batch)
        return losses.contrastive_loss(image, text, scale, real=batch.segments.max(1) > 0)[0]

    value, grads = tiny.jit(jax.value_and_grad(masked))(params, empty)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    fewer = jax.tree.map(lambda x: x[:-1], empty)
    alone, wanted = tiny.jit(jax.value_and_grad(masked))(params, fewer)
    np.testing.assert_allclose(value, alone, rtol=2e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * largest), grads, wanted)
