"""Idefics 1, whole: several pictures, text before the first one, two rows, packed, and its own attention mask."""

import functools

import jax
import numpy as np
import pytest
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.zoo import idefics
from tests import tiny
from tests.parity import compare

I = tiny.IMAGE
SIZES = {
    "vocab_size": 97,
    "additional_vocab_size": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "cross_layer_interval": 2,
    "max_position_embeddings": 128,
    "use_resampler": True,
    "vision_config": {
        "embed_dim": 24,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
    },
}
RESAMPLER = {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8}
CASES = {
    "vector gates, all norms": {
        "alpha_type": "vector",
        "qk_layer_norms": True,
        "perceiver_config": RESAMPLER | {"qk_layer_norms_perceiver": True},
    },
    "scalar gates, no norms": {"perceiver_config": RESAMPLER, "cross_layer_interval": 1, "num_hidden_layers": 3},
}
EACH = ["vector gates, all norms", pytest.param("scalar gates, no norms", marks=pytest.mark.nightly)]
ROWS = [[3, I, 4, I, 2], [I, 2, I, I, 5]]
"""Text before the first picture; two pictures side by side."""


@functools.cache
def make(case):
    torch.manual_seed(0)
    model = compare.perturb(IdeficsForVisionText2Text(IdeficsConfig(**SIZES | CASES[case])))
    config, image_id = idefics.from_hf(model.config.to_dict())
    assert image_id == 98
    assert idefics.fits(config)
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rows = idefics.rows(config)
    return model, LVLM(config), rows, compare.load(rows, compare.tensors(model), shapes)


def masked(batch, pictures):
    """Their inputs: each row's pictures, and which of them each position sees (the last before it)."""
    counts = (batch.image_index >= 0).sum(1)
    most, firsts = counts.max(), np.cumsum([0, *counts])
    pixels = np.zeros((len(counts), most, *pictures.shape[1:]), np.float32)
    for row, count in enumerate(counts):
        pixels[row, :count] = pictures[firsts[row] : firsts[row] + count]
    seen = np.cumsum(batch.image_index >= 0, axis=1) - 1
    mask = (seen[..., None] == np.arange(most)) & (batch.segments > 0)[..., None]
    return torch.tensor(pixels), torch.tensor(mask.astype(np.int64))


@pytest.mark.slow
@pytest.mark.parametrize("case", EACH)
def test_logits(case):
    model, module, _, params = make(case)
    batch, pictures = tiny.batch(module.config, ROWS)
    pixels, mask = masked(batch, pictures)
    real = torch.tensor(batch.segments)
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(batch.tokens.astype(np.int64)),
            pixel_values=pixels,
            image_attention_mask=mask,
            attention_mask=real,
        ).logits.numpy()
    run = jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))
    shown = batch.segments > 0
    compare.close(np.asarray(run(params, batch))[shown], expected[shown], f"Idefics, {case}")
    unread = compare.dead(lambda p: run(p, batch), params)
    assert unread == {"vision/post_norm/scale", "vision/post_norm/bias"}
