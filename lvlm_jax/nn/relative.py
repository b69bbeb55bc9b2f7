"""What attention scores gain by relative position: a learned bias in buckets (T5), or a key of the distance itself."""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lvlm_jax.nn.linear import linear, named
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


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


def waves(distances: int, width: int, longest: float = 10000.0) -> np.ndarray:
    """The distances 0 ... distances-1 as sines, then cosines, of wavelengths up to 2 pi `longest`: float32[S, D]."""
    rates = longest ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.arange(distances, dtype=np.float64)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


class RelativeKeys(nn.Module):
    """Scores of each query with a key made of its distance, and biases that queries gain for both kinds of key.

    With r(d) = W waves(d), a query q scores (q + u) k + (q + v) r(d) for the key k that stands d slots before it. Keys
    behind a query count as of distance 0: for causal attention alone. Distances are those between slots, as for
    `RelativeBias`.

    Attributes:
      width: values of a distance's waves, the model's width; even.
      scale: what scores are multiplied by.

    Parameters: ``r/kernel`` (W), ``content_bias`` (u) and ``position_bias`` (v), of each layer's own.

    Source: Transformer-XL (arXiv 1901.02860), section 3.3.
    """

    width: int
    scale: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, q: Float[Array, "B T H E"], keys: int, first: Int[Array, ""] | int = 0
    ) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T S"]]:
        """(queries to compare with keys, what the scores of `keys` slots from 0 on gain); queries begin at `first`."""
        heads, head = q.shape[-2:]
        draw = named(nn.initializers.normal(0.02), ("heads", None))
        content, position = (
            self.param(name, draw, (heads, head)).astype(q.dtype) for name in ("content_bias", "position_bias")
        )
        r = linear(heads * head, ("embed", "heads"), dtype=self.dtype, name="r")
        r = r(jnp.asarray(waves(keys, self.width), self.dtype)).reshape(keys, heads, head)
        scores = jnp.einsum("BTHE,SHE->BHTS", q + position, r, preferred_element_type=jnp.float32) * self.scale
        away = first + jnp.arange(q.shape[1])[:, None] - jnp.arange(keys)
        taken = jnp.take_along_axis(scores, jnp.clip(away, 0, keys - 1)[None, None], axis=-1)
        return q + content, taken
