"""Picture tokenizers: encoder, codes, codebook, decoder and losses of Chameleon's and Janus's, and the round trip."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAE, JanusVQVAEConfig
from transformers.models.janus import modeling_janus as parts

from lvlm_jax import params as P
from lvlm_jax.nn.linear import abstract
from lvlm_jax.train.losses import tokenizer_loss
from lvlm_jax.vision import vqgan
from lvlm_jax.vision.vq import VQ
from tests.parity import compare

SIZES = {
    "base_channels": 32,
    "channel_multiplier": [1, 2, 2],
    "num_res_blocks": 1,
    "num_embeddings": 40,
    "embed_dim": 12,
    "latent_channels": 20,
}
CASES = {
    "chameleon": (ChameleonVQVAE, ChameleonVQVAEConfig(**SIZES, resolution=16, attn_resolutions=[8])),
    "chameleon without attention": (ChameleonVQVAE, ChameleonVQVAEConfig(**SIZES, resolution=16, attn_type="none")),
    "janus": (JanusVQVAE, JanusVQVAEConfig(**SIZES, num_patches=4)),
}


@functools.cache
def make(case):
    torch.manual_seed(0)
    build, public = CASES[case]
    model = compare.perturb(build(public), factor=1.5)
    with torch.no_grad():  # a codebook among the latents, so that many of its rows are chosen
        latents = model.quant_conv(model.encoder(theirs(pictures(seed=3)))).permute(0, 2, 3, 1).reshape(-1, 12)
        noise = torch.randn(40, 12) * latents.std(0)
        model.quantize.embedding.weight.copy_(latents[:40] + 0.5 * noise)
    config = vqgan.from_hf(model.config.to_dict())
    assert vqgan.from_hf(vqgan.to_hf(config)) == config
    assert vqgan.fits(config) == public.model_type
    shapes, _ = abstract(VQ(config), jnp.zeros((1, 16, 16, 3)))
    rows = vqgan.rows(config, "", "", public.model_type)
    return model, VQ(config), rows, compare.load(rows, compare.tensors(model), shapes)


def pictures(count=3, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 16, 16, 3)).astype(np.float32)


def theirs(pixels):
    return torch.tensor(pixels).permute(0, 3, 1, 2)


def last(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("chameleon", marks=pytest.mark.slow),
        pytest.param("chameleon without attention", marks=pytest.mark.nightly),
        pytest.param("janus", marks=pytest.mark.slow),
    ],
)
def test_reading_and_writing(case):
    model, module, _, params = make(case)
    pixels = pictures()
    with torch.no_grad():
        wanted = model.encode(theirs(pixels))
        latents = model.quant_conv(wanted.last_hidden_state)
    got = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, pixels)
    compare.close(got.latents, last(latents), f"{case}, latents")
    compare.close(got.vectors, last(wanted.quantized_last_hidden_state), f"{case}, quantised vectors")
    np.testing.assert_array_equal(np.asarray(got.codes).ravel(), wanted.image_tokens.numpy())
    assert len(np.unique(got.codes)) > 5
    if not module.config.decoder:
        assert got.made is None
        return
    codes = np.random.default_rng(1).integers(0, 40, got.codes.shape, dtype=np.int32)
    with torch.no_grad():
        made = model.decode(torch.tensor(codes))
    ours = jax.jit(lambda p, c: module.apply({"params": p}, c, method="decode"))(params, codes)
    compare.close(ours, last(made), f"{case}, pictures")


@pytest.mark.nightly
def test_losses_and_gradients():
    """Their embedding loss weighs the codebook by 0.25 and the encoder by 1; gradients of both and of a picture's."""
    model, module, rows, params = make("chameleon")
    pixels = pictures()
    pull = np.random.default_rng(2).normal(size=(3, 4, 4, 12)).astype(np.float32)
    # In float64: their gradients in float32 differ from these by 1.8e-5 of the largest, ours by 2.6e-6.
    model = copy.deepcopy(model).double()
    wanted = model.encode(theirs(pixels).double())
    loss = 300 * wanted.embedding_loss + (wanted.quantized_last_hidden_state * theirs(pull)).sum()
    loss.backward()

    def ours(p, pixels):
        read = module.apply({"params": p}, pixels)
        _, _, sums = tokenizer_loss(pixels, read._replace(made=pixels))
        through = read.latents + jax.lax.stop_gradient(read.vectors - read.latents)
        return 100 * sums["commitment"] + 25 * sums["codebook"] + (through * pull).sum()

    value, grads = jax.jit(jax.value_and_grad(ours))(params, pixels)
    np.testing.assert_allclose(value, loss.item(), rtol=2e-5)
    given = compare.gradients(model)
    expected = P.flatten(P.unflatten({k: v for row in rows for k, v in row.load(given[row.theirs]).items()}))
    flat = P.flatten(grads)
    for part in ("encoder", "to_code", "codebook"):
        keys = sorted(k for k in flat if k.startswith(part))
        both = [np.concatenate([np.asarray(of[k]).ravel() for k in keys]) for of in (flat, expected)]
        compare.close(*both, f"gradients of {part}")


class Up(torch.nn.Module):
    """The authors' decoder, written anew from Janus's parts: attention where the encoder has it, and codes as they are.

    Its levels are numbered from the finest on.
    """

    def __init__(self, model):
        super().__init__()
        c = model.config
        widths = [c.base_channels * times for times in c.channel_multiplier]
        self.conv_in = torch.nn.Conv2d(c.latent_channels, widths[-1], 3, padding=1)
        self.mid = parts.JanusVQVAEMidBlock(c, widths[-1])
        self.up = torch.nn.ModuleList()
        for i, width in enumerate(widths):
            up, incoming = torch.nn.Module(), widths[min(i + 1, len(widths) - 1)]
            up.block = torch.nn.ModuleList(
                parts.JanusVQVAEResnetBlock(c, incoming if j == 0 else width, width)
                for j in range(c.num_res_blocks + 1)
            )
            attends = c.resolution >> i in c.attn_resolutions
            up.attn = torch.nn.ModuleList(parts.JanusVQVAEAttnBlock(width) for _ in up.block if attends)
            if i:
                up.upsample = parts.JanusVQVAEConvUpsample(width)
            self.up.append(up)
        self.norm_out = torch.nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = torch.nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for i in reversed(range(len(self.up))):
            for j, block in enumerate(self.up[i].block):
                x = block(x)
                x = self.up[i].attn[j](x) if len(self.up[i].attn) else x
            x = self.up[i].upsample(x) if i else x
        return self.conv_out(torch.nn.functional.silu(self.norm_out(x)))


@pytest.mark.slow
def test_the_authors_decoder():
    model, module, _, _ = make("chameleon")
    torch.manual_seed(1)
    decoder = compare.perturb(Up(model), factor=1.5)
    config = dataclasses.replace(module.config, decoder=True)
    assert vqgan.fits(config) is None
    with pytest.raises(ValueError, match="no public class holds a picture tokenizer with decoder=True, unit_codes=Fal"):
        vqgan.to_hf(config)
    shapes, _ = abstract(VQ(config), jnp.zeros((1, 16, 16, 3)))
    state = compare.tensors(model) | {f"decoder.{k}": v for k, v in compare.tensors(decoder).items()}
    params = compare.load(vqgan.rows(config, ""), state, shapes)
    codes = np.random.default_rng(1).integers(0, 40, (2, 16), dtype=np.int32)
    with torch.no_grad():
        vectors = model.quantize.embedding(torch.tensor(codes)).reshape(2, 4, 4, -1).permute(0, 3, 1, 2)
        wanted = decoder(model.post_quant_conv(vectors))
    ours = jax.jit(lambda p, c: VQ(config).apply({"params": p}, c, method="decode"))(params, codes)
    compare.close(ours, last(wanted), "the authors' decoder")
