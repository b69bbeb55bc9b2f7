"""Convolutional blocks over pictures, channels last, as the autoencoders of the literature build them.

Source: Taming Transformers (arXiv 2012.09841) and its repository; the same blocks stand in latent diffusion.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.nn import ranges
from lvlm_jax.nn.attention import attend
from lvlm_jax.nn.linear import named
from lvlm_jax.nn.norms import GroupNorm
from lvlm_jax.shapes import Array, DTypeLike, Float

Pads = tuple[tuple[int, int], tuple[int, int]]
EPS = 1e-6
"""Of the group norms in the blocks."""


class Conv(nn.Module):
    """A convolution with bias; its kernel is [height, width, in, out].

    padding: rows and columns of zeros on each side; default half of the kernel, so that stride 1 keeps the size.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: Pads | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N rows columns channels"]) -> Float[Array, "N tall wide features"]:
        draw = named(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (None, None, None, "embed"))
        kernel = self.param("kernel", draw, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", named(nn.initializers.zeros, ("embed",)), (self.features,))
        half = self.size // 2
        out = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=self.padding or ((half, half), (half, half)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out + bias.astype(self.dtype)


class ResidualConv(nn.Module):
    """Two normed convolutions beside the input, which a 1 x 1 convolution widens where the widths differ."""

    features: int
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N rows columns channels"]) -> Float[Array, "N rows columns features"]:
        norm = functools.partial(GroupNorm, self.groups, EPS, self.dtype)
        conv = functools.partial(Conv, self.features, dtype=self.dtype)
        out = conv(name="conv1")(nn.silu(norm(name="norm1")(x)))
        out = conv(name="conv2")(nn.silu(norm(name="norm2")(out)))
        return out + (x if x.shape[-1] == self.features else conv(size=1, name="shortcut")(x))


class SpatialAttention(nn.Module):
    """One head of attention among all places of a picture, beside the input."""

    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N rows columns channels"]) -> Float[Array, "N rows columns channels"]:
        batch, rows, columns, width = x.shape
        project = functools.partial(Conv, width, size=1, dtype=self.dtype)
        normed = GroupNorm(self.groups, EPS, self.dtype, name="norm")(x)
        q, k, v = (project(name=name)(normed).reshape(batch, rows * columns, 1, width) for name in ("q", "k", "v"))
        sees = ranges.full(batch, rows * columns, rows * columns)
        out = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), sees)
        return x + project(name="o")(out.reshape(x.shape))


class Downsample(nn.Module):
    """Half the rows and columns, by a convolution that is padded at the far ends alone."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N rows columns channels"]) -> Float[Array, "N tall wide channels"]:
        return Conv(x.shape[-1], stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Twice the rows and columns: each place repeated, then a convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N rows columns channels"]) -> Float[Array, "N tall wide channels"]:
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x.repeat(2, axis=1).repeat(2, axis=2))
