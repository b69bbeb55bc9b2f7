"""Chameleon: logits with pictures anywhere in the row, both orders of norms, gradients, and every key."""

import copy
import functools

import jax
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonImageProcessorPil

from lvlm_jax.models.lvlm import dummy_batch
from lvlm_jax.models.unified import Unified
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.image import preprocess
from lvlm_jax.zoo import chameleon
from tests import tiny
from tests.parity import compare

I = tiny.IMAGE
WORDS = {"<image>": 98, "<racm3:break>": 4, "<eoss>": 3} | {
    # The order of ids is not that of codes.
    chameleon.code_name(code): int(token)
    for code, token in enumerate(50 + np.random.default_rng(0).permutation(40))
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocabulary_map": WORDS,
    "vq_config": {
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2],
        "num_res_blocks": 1,
        "num_embeddings": 40,
        "embed_dim": 12,
        "latent_channels": 20,
        "resolution": 16,
    },
}
CASES = {
    "pre-norm": {"num_key_value_heads": 4, "model_parallel_size": 1},
    "swin norm, grouped keys": {"num_key_value_heads": 2, "swin_norm": True, "model_parallel_size": 2},
}
ROWS = {
    "two pictures in one row, none in another": [[2, I, 3, I, 4], [9], [4, I, 2]],
    "text alone": [[9], [12]],
}


@functools.cache
def make(case):
    torch.manual_seed(0)
    model = compare.perturb(ChameleonForConditionalGeneration(ChameleonConfig(**SIZES, **CASES[case])), factor=2.0)
    with torch.no_grad():  # a codebook among the latents, so that many of its rows are chosen
        vq = model.model.vqmodel
        latents = vq.quant_conv(vq.encoder(torch.randn(3, 3, 16, 16))).permute(0, 2, 3, 1).reshape(-1, 12)
        noise = torch.randn(40, 12) * latents.std(0)
        vq.quantize.embedding.weight.copy_(latents[:40] + 0.5 * noise)
    config = chameleon.from_hf(model.config.to_dict())
    assert chameleon.from_hf(chameleon.to_hf(config)) == config
    shapes, _ = abstract(Unified(config), dummy_batch(config))
    rows = chameleon.rows(config)
    return model, Unified(config), rows, compare.load(rows, compare.tensors(model), shapes)


def reference(model, batch, pictures):
    return model(
        input_ids=torch.tensor(batch.tokens),
        attention_mask=torch.tensor((batch.segments > 0).astype(np.int64)),
        position_ids=torch.tensor(batch.positions),
        pixel_values=torch.tensor(pictures) if len(pictures) else None,
    ).logits


def test_how_pictures_are_prepared():
    rng = np.random.default_rng(0)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).resize((700, 540))
    theirs = ChameleonImageProcessorPil()(picture, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(preprocess(picture, chameleon.IMAGE), theirs.transpose(1, 2, 0), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    model, module, _, params = make(case)
    run = jax.jit(lambda p, b: (module.apply({"params": p}, b, method=tiny.logits), read(p, b)))
    read = lambda p, b: module.apply({"params": p}, b, method="tokens")  # noqa: E731
    codes = np.asarray(module.config.code_ids)
    for name, rows in ROWS.items():
        for pad in ("right", "left"):
            batch, pictures = tiny.batch(module.config, rows, pad=pad, image_id=98)
            batch = batch.replace(tokens=np.where(np.isin(batch.tokens, codes), 7, batch.tokens))
            with torch.no_grad():
                expected = reference(model, batch, pictures).numpy()
            ours, tokens = (np.asarray(x) for x in run(params, batch))
            shown = batch.segments > 0
            assert (ours[..., codes] == expected[..., codes]).all()  # picture tokens are never predicted
            text = np.setdiff1d(np.arange(99), codes)
            ours, expected = (x[shown][:, text] for x in (ours, expected))
            compare.close(ours, expected, f"Chameleon {case}, {name}, padded on the {pad}")
            if len(pictures):
                with torch.no_grad():
                    theirs = model.get_image_tokens(torch.tensor(pictures)).numpy()
                np.testing.assert_array_equal(tokens[batch.image_index >= 0], theirs.ravel())
                assert len(np.unique(theirs)) > 5


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("pre-norm", marks=pytest.mark.nightly),
        pytest.param("swin norm, grouped keys", marks=pytest.mark.slow),
    ],
)
def test_every_weight_is_read_and_gradients(case):
    model, module, rows, params = make(case)
    batch, pictures = tiny.batch(module.config, [[3, I, 5], [9]], image_id=98)
    shown = (batch.segments > 0)[..., None]
    text = np.setdiff1d(np.arange(99), module.config.code_ids)
    pull = np.zeros((*batch.tokens.shape, 99), np.float32)
    pull[..., text] = np.random.default_rng(1).normal(size=(*batch.tokens.shape, len(text))) * shown
    # In float64, since their float32 is the less exact one; the picture's tokens as they are found in float32.
    read = model.get_image_tokens(torch.tensor(pictures))
    model = copy.deepcopy(model).double()
    tokens = batch.tokens.copy()
    tokens[batch.image_index >= 0] = read.numpy().ravel()
    scores = reference(model, batch.replace(tokens=tokens), ())
    (scores[..., text] * torch.tensor(pull[..., text])).sum().backward()
    theirs = compare.gradients(model)
    wanted = {k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}

    def loss(p, b):
        scores = module.apply({"params": p}, b, method=tiny.logits)
        return (scores[..., text] * pull[..., text]).sum()

    ours = compare.P.flatten(jax.jit(jax.grad(loss))(params, batch))
    keys = sorted(k for k in ours if k.startswith("llm/"))
    # Nobody adds to the rows of tokens that are not in the batch; every other weight of the decoder is read.
    assert all(np.abs(ours[k]).max() > 0 for k in keys)
    assert all(not np.asarray(ours[k]).any() for k in ours if k.startswith("vision/"))  # the tokenizer is frozen
    both = [np.concatenate([np.asarray(of[k]).ravel() for k in keys]) for of in (ours, wanted)]
    compare.close(*both, f"Chameleon {case}, gradients of the decoder")
