"""Convolutions whose kernels are standardised, in place of norms of what goes through them.

Source: NF-ResNets (arXiv 2101.08692), section 4.1.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.nn.linear import named
from lvlm_jax.shapes import Array, DTypeLike, Float

Standardization = Literal["timm", "deepmind"]


def standardized(
    kernel: Float[Array, "Y X C F"], gain: Float[Array, "F"], kind: Standardization
) -> Float[Array, "Y X C F"]:
    """A kernel of mean zero and a variance of 1/fan-in for each output, times `gain`; float32.

    kind: timm adds 1e-5 to the kernel's variance, DeepMind bounds variance times fan-in from below by 1e-4.
    """
    kernel = kernel.astype(jnp.float32)
    mean, var = (f(kernel, axis=(0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    fan_in = kernel[..., 0].size
    spread = {"timm": (var + 1e-5) * fan_in, "deepmind": jnp.maximum(var * fan_in, 1e-4)}[kind]
    return (kernel - mean) * jax.lax.rsqrt(spread) * gain.astype(jnp.float32)


class StandardizedConv(nn.Module):
    """A convolution whose kernel is standardised where it is read, with gain and bias; padded as "SAME"."""

    features: int
    standardization: Standardization
    side: int = 1
    stride: int = 1
    groups: int = 1
    axes: tuple[str | None, str | None] = ("embed", "mlp")
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N Y X C"]) -> Float[Array, "N Y2 X2 F"]:
        shape = (self.side, self.side, x.shape[-1] // self.groups, self.features)
        draw = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel = self.param("kernel", named(draw, (None, None, *self.axes)), shape)
        gain = self.param("scale", named(nn.initializers.ones, self.axes[1:]), (self.features,))
        bias = self.param("bias", named(nn.initializers.zeros, self.axes[1:]), (self.features,))
        out = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            standardized(kernel, gain, self.standardization).astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return out + bias.astype(self.dtype)
