"""NFNet: both standardisations by hand, patches in any order, what a kernel costs, configs that cannot be run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import params as P
from lvlm_jax.nn.conv import standardized
from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import nfnet
from lvlm_jax.vision.vit import patchify
from tests import tiny

PICTURES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Outputs read (1, 3), of variance 1, and (0, 0.002), of variance 1e-6; the fan-in is 2, the gains 2 and 3.
        ("timm", [2 / np.sqrt((1 + 1e-5) * 2), 3 * 0.001 / np.sqrt((1e-6 + 1e-5) * 2)]),
        ("deepmind", [2 / np.sqrt(2), 3 * 0.001 / np.sqrt(1e-4)]),
    ],
)
def test_standardisation_by_hand(kind, expected):
    kernel = jnp.asarray([[1, 0], [3, 0.002]], jnp.float32).reshape(1, 1, 2, 2)
    found = tiny.jit(standardized, static_argnums=2)(kernel, jnp.asarray([2.0, 3.0]), kind)[0, 0]
    np.testing.assert_allclose(found, [[-expected[0], -expected[1]], expected], rtol=1e-5)


@pytest.mark.slow
def test_patches_may_come_in_any_order_and_padding_is_not_read():
    tower = tiny.NFNET.build(jnp.float32)
    patches, positions, segments = patchify(jnp.asarray(PICTURES), 32)
    params = tiny.randomize(abstract(tower, patches, positions, segments)[0])
    run = tiny.jit(lambda p, *args: tower.apply({"params": p}, *args, method="features"))
    # Two places too many, which hold nothing.
    pad = lambda x, value: jnp.concatenate([x, jnp.full_like(x[:, :2], value)], axis=1)  # noqa: E731
    padded = pad(patches, 9.0), pad(positions, 0), pad(segments, 0)
    base = np.asarray(run(params, *padded))
    order = np.asarray([4, 2, 0, 5, 3, 1])
    moved = run(params, *(x[:, order] for x in padded))
    np.testing.assert_array_equal(np.asarray(moved)[:, order < 4], base[:, order[order < 4]])
    # A row of padding alone, which fills up a batch, stays finite.
    assert np.isfinite(run(params, padded[0], padded[1], jnp.zeros_like(padded[2]))).all()
    # Each place of the map is that of its patch: pixels of another corner reach it through the blocks, but less.
    changed = run(params, padded[0].at[:, 0].add(1.0), *padded[1:])
    assert np.abs(np.asarray(changed) - base).mean((0, 2))[:4].argmax() == 0


@pytest.mark.slow
def test_what_each_kernel_costs():
    """F0 at 256 pixels, its test size: 12.38 G multiplications, as the paper counts them."""
    config = dataclasses.replace(nfnet.PRESETS["nfnet_f0"], image_size=256)
    picture = patchify(jnp.zeros((1, 256, 256, 3)), 32)
    shapes = P.flatten(abstract(config.build(jnp.float32), *picture)[0])
    found = sum(config.places(path) * P.size(leaf) for path, leaf in shapes.items() if path.endswith("/kernel"))
    assert found == pytest.approx(12.38e9, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 60}, "image_size=60 is no multiple of the stride of an NFNet, 32"),
        ({"depths": (1, 2, 3)}, r"depths=\(1, 2, 3\) and .*an NFNet has four stages"),
        ({"widths": (16, 24, 32, 32)}, "half of 24 does not divide into groups of group_width=8"),
        ({"stem_width": 12}, "stem_width=12 is no multiple of 8"),
        ({"activation": "relu"}, "activation='relu': an NFNet has one of gelu, gelu_tanh, silu"),
        ({"feature_layer": -3}, "feature_layer=-3: -1 is the last convolution's map"),
    ],
)
def test_configs_that_cannot_be_run(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.NFNET, **change)
