"""Connectors: how many tokens they give, their keys, and their entry in a config.json of ours."""

import dataclasses

import jax.numpy as jnp
import pytest

from lvlm_jax import keymap
from lvlm_jax import params as P
from lvlm_jax.connectors import CONNECTORS, IDEFICS, IDEFICS2, LinearConfig, MlpConfig, PerceiverConfig, keys
from lvlm_jax.nn.linear import abstract

CASES = {
    "linear": LinearConfig(),
    "mlp": MlpConfig(activation="gelu_tanh"),
    "flamingo": PerceiverConfig(latents=4, depth=2, heads=2, head_dim=8),
    "idefics": PerceiverConfig(**IDEFICS),
    "idefics2": PerceiverConfig(**IDEFICS2),
}
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
    assert tokens == {"linear": 16, "mlp": 16, "flamingo": 4}.get(name, 64)


@pytest.mark.parametrize("name", CASES)
def test_entry_goes_out_and_comes_back(name):
    assert keys.from_dict(keys.to_dict(CASES[name])) == CASES[name]


def test_every_kind_has_key_rows():
    assert set(keys.ROWS) == set(CONNECTORS.values())


def test_entries_we_cannot_run():
    with pytest.raises(ValueError, match=r"connector.kind is 'qformer'.*'linear', 'mlp', 'perceiver'"):
        keys.from_dict({"kind": "qformer"})
    with pytest.raises(ValueError, match=r"connector field is 'latent'.*'latents'"):
        keys.from_dict({"kind": "perceiver", "latent": 3})


def test_the_authors_names():
    named = lambda config: [row.theirs for row in keys.original_rows(config)]  # noqa: E731
    assert named(LinearConfig()) == ["model.mm_projector.weight", "model.mm_projector.bias"]
    assert named(MlpConfig())[::2] == ["model.mm_projector.0.weight", "model.mm_projector.2.weight"]
    with pytest.raises(ValueError, match="no resampler"):
        named(dataclasses.replace(CASES["flamingo"]))
