"""PaliGemma's codec of masks against its description in torch, under the authors' names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import mask_codec
from lvlm_jax.vision.mask_codec import MaskCodec
from tests.parity import compare


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        sizes = [(3, 1), (3, 1), (1, 0)]
        convs = [nn.Conv2d(width, width, size, padding=pad) for size, pad in sizes]
        self.net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x):
        return x + self.net(x)


class Quantizer(nn.Module):
    """The codebook is a buffer there; a parameter here, so that it is perturbed with the rest."""

    def __init__(self):
        super().__init__()
        self._embedding = nn.Parameter(torch.randn(128, 512))


class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        self._vq_vae = Quantizer()
        down, up = [], []
        for before, after in ((1, 16), (16, 32), (32, 64), (64, 128)):
            down += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        for before, after in ((128, 128), (128, 64), (64, 32), (32, 16)):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(*down, Residual(128), Residual(128), nn.Conv2d(128, 512, 1))
        first = [nn.Conv2d(512, 128, 1), nn.ReLU(), Residual(128), Residual(128)]
        self.decoder = nn.Sequential(*first, *up, nn.Conv2d(16, 1, 1))

    def vectors(self, masks):
        return self.encoder(2 * masks[:, None] - 1).permute(0, 2, 3, 1)

    def encode(self, masks):
        return torch.cdist(self.vectors(masks).reshape(len(masks), 16, 512), self._vq_vae._embedding).argmin(-1)

    def decode(self, codes):
        return self.decoder(self._vq_vae._embedding[codes].reshape(-1, 4, 4, 512).permute(0, 3, 1, 2))[:, 0]


@pytest.mark.slow
def test_both_ways():
    torch.manual_seed(0)
    model = compare.perturb(Reference(), factor=2.0)
    rng = np.random.default_rng(0)
    masks = (rng.random((3, 64, 64)) < rng.random((3, 1, 1))).astype(np.float32)
    with torch.no_grad():
        vectors = model.vectors(torch.tensor(masks))
        # Codes that are far from one another would all map to one; so the book holds what the encoder gives.
        model._vq_vae._embedding[:48] = vectors.reshape(48, 512) + 0.1 * torch.randn(48, 512)
        codes = model.encode(torch.tensor(masks))
        decoded = model.decode(codes)
    assert len(set(codes.flatten().tolist())) > 20
    codec = MaskCodec()
    shapes, _ = abstract(codec, jnp.zeros((1, 64, 64)))
    params = compare.load(mask_codec.rows(), compare.tensors(model), shapes)
    apply = lambda method: jax.jit(lambda p, x: codec.apply({"params": p}, x, method=method))  # noqa: E731
    encode, decode = apply("encode"), apply("decode")
    found = apply(lambda c, x: c.encoder(2 * x[..., None] - 1))(params, masks)
    compare.close(found, vectors, "mask codec, encoder")
    np.testing.assert_array_equal(encode(params, masks), codes)
    compare.close(decode(params, jnp.asarray(codes)), decoded, "mask codec, decoder")
    shown = jnp.asarray(masks)[..., None]
    encoder = lambda c, x: c.encoder(x)  # noqa: E731
    both = jax.jit(lambda p: (codec.apply({"params": p}, shown, method=encoder), decode(p, jnp.asarray(codes))))
    assert compare.dead(lambda p: np.concatenate([np.ravel(out) for out in both(p)]), params) == set()
