"""Norms, activations and embeddings against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from lvlm_jax.nn.embed import Embed
from lvlm_jax.nn.linear import init
from lvlm_jax.nn.mlp import ACTIVATIONS
from lvlm_jax.nn.norms import NORMS, LayerNorm, OffsetRMSNorm, RMSNorm

X = np.random.default_rng(0).normal(2, 3, size=(4, 16)).astype(np.float32)
FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(X)), FORMULAS[name](X.astype(np.float64)), atol=3e-6)


def test_norms():
    scale, bias = np.linspace(0.5, 2, 16, dtype=np.float32), np.linspace(-1, 1, 16, dtype=np.float32)
    wide = X.astype(np.float64)
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * scale
    got = RMSNorm(0.1).apply({"params": {"scale": scale}}, jnp.asarray(X))
    np.testing.assert_allclose(got, rms, rtol=1e-5)
    got = OffsetRMSNorm(0.1).apply({"params": {"scale": scale - 1}}, jnp.asarray(X))
    np.testing.assert_allclose(got, rms, rtol=1e-5)
    layer = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 0.1) * scale + bias
    got = LayerNorm(0.1).apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(X))
    np.testing.assert_allclose(got, layer, rtol=2e-5, atol=1e-6)
    got = NORMS["layer_no_bias"](0.1).apply({"params": {"scale": scale}}, jnp.asarray(X))
    np.testing.assert_allclose(got, layer - bias, rtol=2e-5, atol=1e-6)


def test_norms_of_large_values_in_bfloat16_are_computed_in_float32():
    x = jnp.asarray(1000 + X, jnp.bfloat16)
    got = LayerNorm(1e-5, jnp.bfloat16).apply({"params": {"scale": np.ones(16), "bias": np.zeros(16)}}, x)
    assert got.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=1e-2, atol=1e-2)


def test_embedding_reads_rows_and_lends_its_table_to_a_head():
    embed = Embed(7, 3)
    tokens = jnp.asarray([[0, 6, 2]])
    params = init(embed, jax.random.key(0), tokens)
    np.testing.assert_array_equal(embed.apply({"params": params}, tokens)[0], params["table"][np.array([0, 6, 2])])
    np.testing.assert_array_equal(embed.apply({"params": params}, method="kernel"), params["table"].T)
