"""Learned bias of attention scores by relative position, in buckets that widen with the distance."""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lvlm_jax.nn.linear import named
from lvlm_jax.shapes import Array, Float, Int


@functools.cache
def distance_buckets(buckets: int, furthest: int) -> np.ndarray:
    """The bucket of each distance 0 ... furthest: half of the buckets hold one distance, the others ever more.

    A table, made on the host: a logarithm computed on a device may fall on the other side of a bucket's border.
    """
    exact = buckets // 2
    distance = np.arange(furthest + 1, dtype=np.float32)
    steps = np.log(np.maximum(distance, 1) / np.float32(exact)) / np.float32(math.log(furthest / exact))
    wide = exact + (steps * np.float32(buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance.astype(np.int32), np.minimum(wide, buckets - 1)).astype(np.int32)


class RelativeBias(nn.Module):
    """One number a head for each bucket of distances from a query to a key.

    Distances are those between slots of a row, so that padded and packed rows need nothing more: within a segment slots
    and positions run alike, and between segments nobody looks.

    Attributes:
      causal: all buckets are for keys before the query; else half of them are for those behind it.

    Source: T5 (arXiv 1910.10683), section 2.1.
    """

    heads: int
    buckets: int = 32
    furthest: int = 128
    causal: bool = False

    @nn.compact
    def __call__(self, queries: int, keys: int, first: Int[Array, ""] | int = 0) -> Float[Array, "H T S"]:
        """The bias of `queries` slots from `first` on towards `keys` slots from 0 on, float32."""
        init = named(nn.initializers.normal(0.02), (None, "heads"))
        table = self.param("table", init, (self.buckets, self.heads))
        away = jnp.arange(keys) - (first + jnp.arange(queries))[:, None]
        sides = 1 if self.causal else 2
        near = jnp.asarray(distance_buckets(self.buckets // sides, self.furthest))
        bucket = near[jnp.clip(-away if self.causal else jnp.abs(away), 0, self.furthest)]
        bucket = bucket if self.causal else bucket + (away > 0) * (self.buckets // sides)
        return jnp.take(table.astype(jnp.float32), bucket, axis=0, mode="clip").transpose(2, 0, 1)
