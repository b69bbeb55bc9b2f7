"""Connectors: how many tokens they give, their keys, and their entry in a config.json of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import keymap
from lvlm_jax import params as P
from lvlm_jax.connectors import (
    CONNECTORS,
    IDEFICS,
    IDEFICS2,
    AveragePoolConfig,
    GatedConfig,
    LinearConfig,
    MlpConfig,
    PerceiverConfig,
    PixelShuffleConfig,
    QFormerConfig,
    keys,
)
from lvlm_jax.connectors.pooled import average_pool, pixel_shuffle
from lvlm_jax.nn.linear import abstract, init

CASES = {
    "linear": LinearConfig(),
    "mlp": MlpConfig(activation="gelu_tanh"),
    "flamingo": PerceiverConfig(latents=4, depth=2, heads=2, head_dim=8),
    "idefics": PerceiverConfig(**IDEFICS),
    "idefics2": PerceiverConfig(**IDEFICS2),
    "pixel_shuffle": PixelShuffleConfig(factor=4),
    "four of a row": PixelShuffleConfig(factor=1, across=4, bias=True),
    "average_pool": AveragePoolConfig(side=2),
    "gated": GatedConfig(hidden=40),
    "qformer": QFormerConfig(queries=8, width=16, depth=4, heads=2, mlp_dim=24),
}
SIZES = {"linear": 16, "mlp": 16, "gated": 16, "flamingo": 4, "average_pool": 4, "qformer": 8}
SIZES |= {"pixel_shuffle": 1, "four of a row": 4}
"""Visual tokens of a picture with 16 features; 64 the others."""
FEATURES = jnp.zeros((2, 16, 32))


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_keys(name):
    config = CASES[name]
    module = config.build(24, jnp.float32)
    shapes, _ = abstract(module, FEATURES)
    rows = keys.rows(config, "connector", "multi_modal_projector")
    theirs = [row.theirs for row in rows]
    keymap.check(rows, [f"connector/{path}" for path in P.flatten(shapes)], theirs, name)
    assert len(set(theirs)) == len(theirs)
    tokens = config.tokens(16)
    assert tokens == SIZES.get(name, 64)
    assert jax.eval_shape(lambda: module.apply({"params": P.unflatten(zeros(shapes))}, FEATURES)).shape == (
        2,
        tokens,
        24,
    )


def zeros(shapes):
    return {path: jnp.zeros(leaf.shape) for path, leaf in P.flatten(shapes).items()}


@pytest.mark.parametrize("name", CASES)
def test_entry_goes_out_and_comes_back(name):
    assert keys.from_dict(keys.to_dict(CASES[name])) == CASES[name]


def test_every_kind_has_key_rows():
    assert set(keys.ROWS) == set(CONNECTORS.values())


def test_entries_we_cannot_run():
    with pytest.raises(ValueError, match=r"connector.kind is 'abstractor'.*'linear', 'mlp', 'perceiver'"):
        keys.from_dict({"kind": "abstractor"})
    with pytest.raises(ValueError, match=r"connector field is 'latent'.*'latents'"):
        keys.from_dict({"kind": "perceiver", "latent": 3})


def test_the_authors_names():
    named = lambda config: [row.theirs for row in keys.original_rows(config)]  # noqa: E731
    assert named(LinearConfig()) == ["model.mm_projector.weight", "model.mm_projector.bias"]
    assert named(MlpConfig())[::2] == ["model.mm_projector.0.weight", "model.mm_projector.2.weight"]
    with pytest.raises(ValueError, match="no perceiver connector"):
        named(CASES["flamingo"])
    with pytest.raises(ValueError, match="no pixel_shuffle connector"):
        named(CASES["pixel_shuffle"])


def test_where_neighbours_go():
    """A 4 x 4 picture whose features are (row, column)."""
    places = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij"), -1).reshape(1, 16, 2)
    joined = np.asarray(pixel_shuffle(jnp.asarray(places), 2))
    assert joined.shape == (1, 4, 8)
    # The token at the right of the first row: columns 2 and 3 of row 0, then of row 1.
    assert joined[0, 1].reshape(4, 2).tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    # MiniGPT-v2's four: as the features stand in memory.
    four = np.asarray(pixel_shuffle(jnp.asarray(places), 1, 4))
    np.testing.assert_array_equal(four, places.reshape(1, 4, 8))
    assert np.asarray(average_pool(jnp.asarray(places), 2))[0].tolist() == [
        [0.5, 0.5],
        [0.5, 2.5],
        [2.5, 0.5],
        [2.5, 2.5],
    ]


@pytest.mark.parametrize(
    ("config", "features", "message"),
    [
        (PixelShuffleConfig(factor=3), 16, r"pixel shuffle: factor=3 does not divide the 4 x 4 features"),
        (PixelShuffleConfig(factor=1, across=3), 16, r"pixel shuffle: across=3 does not divide the 4 x 4 features"),
        (PixelShuffleConfig(), 17, r"pixel shuffle reads the features of a square picture, and 17 are none; a class"),
        (AveragePoolConfig(side=3), 16, r"average pool: side=3 does not divide the 4 x 4 features"),
        (AveragePoolConfig(), 257, r"average pool reads the features of a square picture, and 257 are none"),
    ],
)
def test_features_that_do_not_divide(config, features, message):
    with pytest.raises(ValueError, match=message):
        config.tokens(features)
    with pytest.raises(ValueError, match=message):
        abstract(config.build(8, jnp.float32), jnp.zeros((1, features, 4)))


@pytest.mark.parametrize(("std", "expected"), [(None, 1 / np.sqrt(4 * 64)), (0.005, 0.005)])
def test_the_size_of_fresh_weights(std, expected):
    module = PixelShuffleConfig(std=std).build(128, jnp.float32)
    kernel = init(module, jax.random.key(0), jnp.zeros((1, 16, 64)))["linear_1"]["kernel"]
    np.testing.assert_allclose(kernel.std(), expected, rtol=0.02)  # of 32,768 draws


def test_sizes_of_none():
    with pytest.raises(ValueError, match=r"factor=0: how many neighbours"):
        PixelShuffleConfig(factor=0)
    with pytest.raises(ValueError, match=r"across=0: how many neighbours"):
        PixelShuffleConfig(across=0)
    with pytest.raises(ValueError, match=r"std=0.0: the deviation of fresh weights is positive"):
        PixelShuffleConfig(std=0.0)
    with pytest.raises(ValueError, match=r"side=0: how many tokens"):
        AveragePoolConfig(side=0)
