"""Normalisation layers, computed in float32."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.nn.linear import named
from lvlm_jax.shapes import Array, DTypeLike, Float


class RMSNorm(nn.Module):
    """Root-mean-square norm, as LLaMA computes it: normalise in float32, round, then scale."""

    eps: float
    dtype: DTypeLike = jnp.float32
    axes: tuple[str | None, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", named(nn.initializers.ones, self.axes), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(self.dtype) * scale.astype(self.dtype)


class OffsetRMSNorm(nn.Module):
    """Root-mean-square norm, as Gemma computes it: times one plus the parameter, rounded at the very end."""

    eps: float
    dtype: DTypeLike = jnp.float32
    axes: tuple[str | None, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", named(nn.initializers.zeros, self.axes), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * (1 + scale.astype(jnp.float32))).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm with scale and, unless told otherwise, bias."""

    eps: float
    dtype: DTypeLike = jnp.float32
    axes: tuple[str | None, ...] = ("embed",)
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", named(nn.initializers.ones, self.axes), (x.shape[-1],))
        bias = self.param("bias", named(nn.initializers.zeros, self.axes), (x.shape[-1],)) if self.use_bias else None
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        wide = wide * scale.astype(jnp.float32)
        return (wide if bias is None else wide + bias.astype(jnp.float32)).astype(self.dtype)


class HeadLayerNorm(nn.Module):
    """Layer norm of each head's vector, with a scale and bias of each head's own (Chameleon's queries and keys)."""

    eps: float
    dtype: DTypeLike = jnp.float32
    axes: tuple[str | None, ...] = (None,)

    @nn.compact
    def __call__(self, x: Float[Array, "*B H E"]) -> Float[Array, "*B H E"]:
        axes = (None, *self.axes)
        scale = self.param("scale", named(nn.initializers.ones, axes), x.shape[-2:])
        bias = self.param("bias", named(nn.initializers.zeros, axes), x.shape[-2:])
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


class GroupNorm(nn.Module):
    """Norm of a picture's channels in groups of neighbours, over all places, with scale and bias.

    Raises:
      ValueError: channels that do not divide into so many groups.
    """

    groups: int
    eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N rows columns channels"]) -> Float[Array, "N rows columns channels"]:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"{channels} channels do not divide into {self.groups} groups; choose a multiple")
        scale = self.param("scale", named(nn.initializers.ones, ("embed",)), (channels,))
        bias = self.param("bias", named(nn.initializers.zeros, ("embed",)), (channels,))
        wide = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, channels // self.groups)
        centred = wide - jnp.mean(wide, axis=(1, 2, 4), keepdims=True)
        wide = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=(1, 2, 4), keepdims=True) + self.eps)
        return (wide.reshape(x.shape) * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Vectors of length one, in float32; the epsilon (SigLIP's) under the root gives a zero vector a gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-16)


NORMS = {
    "rms": RMSNorm,
    "offset_rms": OffsetRMSNorm,
    "layer": LayerNorm,
    "layer_no_bias": functools.partial(LayerNorm, use_bias=False),
    "head_layer": HeadLayerNorm,
}
