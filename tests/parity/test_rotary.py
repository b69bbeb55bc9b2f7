"""Rotary frequencies and rotation, plain and scaled."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from lvlm_jax.nn.positions import RopeScaling, rope_frequencies, rotary, rotate_half

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES = {
    "plain": ({"rope_type": "default", "rope_theta": 10000.0}, None),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
    "yarn": (
        YARN | {"rope_theta": 1000000.0},
        RopeScaling(kind="yarn", factor=4.0, original_context=32768),
    ),
    "yarn, every field": (
        YARN | {"rope_theta": 10000.0, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 0.7},
        RopeScaling(
            kind="yarn",
            factor=4.0,
            original_context=32768,
            beta_fast=20.0,
            beta_slow=2.0,
            truncate=False,
            attention_factor=0.7,
        ),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        RopeScaling(kind="llama3", factor=32.0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rotation(case):
    public, scaling = CASES[case]
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=dict(public))
    module = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(rope_frequencies(64, public["rope_theta"], scaling), module.inv_freq, rtol=3e-7)
    positions = np.array([[0, 1, 2, 63, 64, 1000], [5, 5, 7, 4, 3, 2047]])
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 64)).astype(np.float32)
    cos, sin = module(torch.tensor(x), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2)
    ours = rotate_half(jnp.asarray(x), *rotary(jnp.asarray(positions, jnp.int32), 64, public["rope_theta"], scaling))
    np.testing.assert_allclose(ours, expected, atol=5e-4)  # angles of 2047 radians: float32 holds them to 1e-4
    np.testing.assert_allclose(ours[0, :3], expected[0, :3], atol=2e-6)


def test_the_first_part_of_a_head_in_halves():
    """Phi's rotation: the first 40 % of 80 values are turned, the rest is left as it is."""
    config = PhiConfig(hidden_size=160, num_attention_heads=2, partial_rotary_factor=0.4)
    module = PhiRotaryEmbedding(config)
    positions = np.array([[0, 1, 2, 63, 64, 1000]])
    x = np.random.default_rng(0).normal(size=(1, 6, 2, 80)).astype(np.float32)
    cos, sin = module(torch.tensor(x), torch.tensor(positions))
    part = torch.tensor(x[..., :32])
    expected, _ = apply_rotary_pos_emb(part, part, cos, sin, unsqueeze_dim=2)
    ours = np.asarray(rotate_half(jnp.asarray(x), *rotary(jnp.asarray(positions, jnp.int32), 32, 10000.0)))
    np.testing.assert_allclose(ours[..., :32], expected, atol=2e-4)
    np.testing.assert_array_equal(ours[..., 32:], x[..., 32:])
